//! Who is advanced next: the pure part of the engine loop.
//!
//! Samples of equal key make a group and are advanced together. Interactive ones go first: whoever is of the batch lane fills what they leave
//! of a batch, or is parked, which is to say not advanced, until they are done. So that parked work is not parked for ever, it has one round
//! of [`PATIENCE`]. Within a group those who came first are finished first; groups take turns.

use std::collections::HashMap;

use efferent_proto::v1::Lane;
use efferent_worker::engine::BatchKey;

/// Of this many rounds, one goes to the batch lane's work if that had none.
pub const PATIENCE: u64 = 10;

/// What counts of a sample.
#[derive(Debug, Clone, Copy)]
pub struct Waiting<'a> {
    /// Which samples it can be advanced with.
    pub key: &'a BatchKey,
    /// How urgent it is.
    pub lane: Lane,
}

impl Waiting<'_> {
    fn is_batch(&self) -> bool {
        self.lane == Lane::Batch
    }
}

/// Whose turn it was.
#[derive(Debug, Default)]
pub struct Turns {
    round: u64,
    /// The last round that was the batch lane's.
    batch: u64,
    /// The last round in which some of a group and lane were advanced, or before which they came.
    last: HashMap<(bool, BatchKey), u64>,
}

impl Turns {
    /// Which of `line`, who are in the order in which they came, are advanced in this round: the more urgent first. `size` tells how many
    /// of this many samples of a key to advance together.
    pub fn next(&mut self, line: &[Waiting<'_>], size: impl Fn(&BatchKey, usize) -> usize) -> Vec<usize> {
        let before = self.round;
        self.round += 1;
        let group = |waiting: &Waiting<'_>| (waiting.is_batch(), waiting.key.clone());
        self.last.retain(|known, _| line.iter().any(|waiting| group(waiting) == *known));
        for waiting in line {
            self.last.entry(group(waiting)).or_insert(before);
        }
        let turn = |waiting: &Waiting<'_>| self.last.get(&group(waiting)).copied().unwrap_or(before);
        let first = |batch: bool| line.iter().filter(|waiting| waiting.is_batch() == batch).min_by_key(|w| turn(w));
        let due = |round: u64| self.round >= round + PATIENCE;
        let lead = match (first(false), first(true)) {
            (Some(_), Some(parked)) if due(self.batch) && due(turn(parked)) => parked,
            (Some(urgent), _) => urgent,
            (None, Some(batch)) => batch,
            (None, None) => return Vec::new(),
        };
        let lead = *lead;
        if lead.is_batch() {
            self.batch = self.round;
        }
        let mut mates: Vec<usize> = (0..line.len()).filter(|index| line[*index].key == lead.key).collect();
        mates.sort_by_key(|index| line[*index].is_batch() != lead.is_batch());
        mates.truncate(size(lead.key, mates.len()).max(1));
        for index in &mates {
            self.last.insert(group(&line[*index]), self.round);
        }
        mates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample in the line: key, lane, steps left.
    type Sample = (&'static str, Lane, u32);

    /// Takes rounds of at most `size` until the line is empty, with newcomers before some rounds; tells of each round who was advanced.
    fn run(
        mut line: Vec<(usize, Sample)>,
        size: usize,
        rounds: usize,
        come: impl Fn(usize) -> Vec<Sample>,
    ) -> Vec<Vec<usize>> {
        let (mut turns, mut story, mut next) = (Turns::default(), Vec::new(), line.len());
        for round in 0..rounds {
            for sample in come(round) {
                line.push((next, sample));
                next += 1;
            }
            let keys: Vec<BatchKey> = line.iter().map(|(_, (key, ..))| BatchKey((*key).to_owned())).collect();
            let waiting: Vec<_> =
                line.iter().zip(&keys).map(|((_, (_, lane, _)), key)| Waiting { key, lane: *lane }).collect();
            let mates = turns.next(&waiting, |_, count| count.min(size));
            assert!(line.is_empty() || !mates.is_empty(), "no round is lost");
            assert!(mates.len() <= size);
            mates.iter().for_each(|index| line[*index].1.2 -= 1);
            story.push(mates.iter().map(|index| line[*index].0).collect());
            line.retain(|(_, (.., steps))| *steps > 0);
        }
        story
    }

    fn line(samples: &[Sample]) -> Vec<(usize, Sample)> {
        samples.iter().copied().enumerate().collect()
    }

    #[test]
    fn who_came_first_is_finished_first_and_groups_take_turns() {
        let (one, other) = (("a", Lane::Batch, 2), ("b", Lane::Batch, 2));
        let story = run(line(&[one, one, one, other]), 2, 6, |_| Vec::new());
        assert_eq!(story, [vec![0, 1], vec![3], vec![0, 1], vec![3], vec![2], vec![2]]);
    }

    #[test]
    fn interactive_work_goes_first_and_batch_work_fills_what_it_leaves() {
        let batch = ("a", Lane::Batch, 6);
        let come = |round| if round == 2 { vec![("a", Lane::Interactive, 2)] } else { Vec::new() };
        let story = run(line(&[batch, batch]), 2, 8, come);
        assert_eq!(story, [vec![0, 1], vec![0, 1], vec![2, 0], vec![2, 0], vec![0, 1], vec![0, 1], vec![1], vec![1]]);
        // Of another shape: all batch work is parked.
        let come = |round| if round == 2 { vec![("b", Lane::Interactive, 3)] } else { Vec::new() };
        let story = run(line(&[batch, batch]), 2, 9, come);
        assert_eq!(story[2..5], [vec![2], vec![2], vec![2]]);
        assert_eq!(story.concat().iter().filter(|index| **index < 2).count(), 12);
    }

    #[test]
    fn parked_work_has_one_round_of_ten() {
        // Interactive work without end, more than fits, of several shapes; three shapes of batch work.
        let urgent = |key| (key, Lane::Interactive, 3);
        let come = move |_| vec![urgent("a"), urgent("b")];
        let batch = |key| (key, Lane::Batch, 10);
        let story = run(line(&[batch("a"), batch("b"), batch("c")]), 1, 400, come);
        let rounds = |index| (0..400).filter(|round| story[*round].contains(&index)).collect::<Vec<_>>();
        for index in 0..3 {
            assert_eq!(rounds(index).len(), 10, "batch sample {index} is finished");
        }
        let batch_rounds: Vec<_> = (0..400).filter(|round| story[*round].iter().any(|index| *index < 3)).collect();
        assert!(batch_rounds.windows(2).all(|pair| pair[1] - pair[0] == PATIENCE as usize), "{batch_rounds:?}");
    }

    #[test]
    fn a_stream_of_short_work_does_not_keep_a_group_from_its_turn() {
        let come = |_| vec![("a", Lane::Interactive, 1)];
        let story = run(line(&[("b", Lane::Interactive, 20)]), 4, 60, come);
        assert_eq!(story.iter().filter(|mates| mates.contains(&0)).count(), 20);
    }
}
