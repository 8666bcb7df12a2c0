//! Attempts at tasks that did not end well, and how often which kind of failure may happen.
//!
//! A first attempt writes nothing here, so that requests that go well pay nothing. Whoever gets a task that was delivered before writes that it
//! begins, in the job's record: an attempt that begins and says nothing more was its worker's last.

use std::{collections::BTreeMap, time::SystemTime};

use efferent_proto::{
    internal::JobRecord,
    time,
    v1::{Attempt, FailureClass},
};

/// Attempts at a task that may end in a failed computation or for want of something.
pub const MAX_TRANSIENT: u32 = 5;
/// Attempts at a task that may find too little memory.
pub const MAX_OUT_OF_MEMORY: u32 = 3;
/// Workers (their engines, or the whole process) that a task may take down.
pub const MAX_CRASHES: u32 = 3;
/// After so many crashes, a task is worked on alone: if it is at fault, nobody else's work is lost with its next worker, and if it is not, it gets
/// away from the one that is.
pub const ALONE_FROM: u32 = MAX_CRASHES - 1;
/// Deliveries of a task, whatever became of them.
pub const MAX_DELIVERIES: u32 = 32;
/// Bytes of an error that are kept.
const MAX_ERROR: usize = 240;

/// Attempts at a task, by what they came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally(BTreeMap<i32, u32>);

impl Tally {
    /// Of a task's attempts in a record.
    pub fn of(record: &JobRecord, task: &str) -> Self {
        let mut tally = BTreeMap::new();
        for attempt in record.attempts.iter().filter(|attempt| attempt.task == task) {
            *tally.entry(attempt.class).or_default() += 1;
        }
        Self(tally)
    }

    fn count(&self, class: FailureClass) -> u32 {
        self.0.get(&class.into()).copied().unwrap_or(0)
    }

    /// Engines and workers that went down.
    pub fn crashes(&self) -> u32 {
        self.count(FailureClass::EngineCrash) + self.count(FailureClass::WorkerLost)
    }

    /// Whether the next attempt is to be made with nothing else in its worker.
    pub fn is_suspect(&self) -> bool {
        self.crashes() >= ALONE_FROM || self.count(FailureClass::OutOfMemory) > 0
    }

    /// The class that has reached its limit, if one has.
    pub fn exhausted(&self) -> Option<FailureClass> {
        let limits = [
            (self.crashes() >= MAX_CRASHES, self.crash_class()),
            (self.count(FailureClass::OutOfMemory) >= MAX_OUT_OF_MEMORY, FailureClass::OutOfMemory),
            (self.count(FailureClass::Transient) >= MAX_TRANSIENT, FailureClass::Transient),
        ];
        limits.into_iter().find(|(reached, _)| *reached).map(|(_, class)| class)
    }

    fn crash_class(&self) -> FailureClass {
        let panics = self.count(FailureClass::EngineCrash) >= self.count(FailureClass::WorkerLost);
        if panics { FailureClass::EngineCrash } else { FailureClass::WorkerLost }
    }
}

/// A task that was delivered before is begun again. What earlier attempts left open has ended with their workers.
pub(super) fn begin(record: &mut JobRecord, attempt: &Attempt, now: SystemTime) {
    let earlier = record.attempts.iter_mut().filter(|earlier| earlier.task == attempt.task);
    let mut first_is_told = attempt.number <= 1;
    for earlier in earlier {
        first_is_told |= earlier.number == 1;
        if earlier.class() == FailureClass::Unspecified {
            lose(earlier);
        }
    }
    if !first_is_told {
        let worker_id = first_worker(record, attempt).unwrap_or_default();
        let time = Some(time::timestamp(now));
        let mut first = Attempt { number: 1, worker_id, time, ..attempt.clone() };
        lose(&mut first);
        record.attempts.push(first);
    }
    // One too many is not made.
    if Tally::of(record, &attempt.task).exhausted().is_none() {
        record.attempts.push(Attempt { time: Some(time::timestamp(now)), ..attempt.clone() });
    }
}

fn lose(attempt: &mut Attempt) {
    attempt.set_class(FailureClass::WorkerLost);
    attempt.error = "the worker died, or was not heard of for as long as its lease".to_owned();
}

/// Who began the job's first task of this kind, as far as that was told.
fn first_worker(record: &JobRecord, attempt: &Attempt) -> Option<String> {
    use efferent_proto::v1::job_event::Event;
    let of_brain = attempt.queue.starts_with("brain.");
    record.log.iter().find_map(|event| match &event.event {
        Some(Event::Conditioning(begun)) if of_brain => Some(begun.worker_id.clone()),
        Some(Event::Rendering(begun)) if !of_brain && one_image(record) => Some(begun.worker_id.clone()),
        _ => None,
    })
}

fn one_image(record: &JobRecord) -> bool {
    let request = record.job.as_ref().and_then(|job| job.request.as_ref());
    request.is_none_or(|request| request.image_count() <= 1)
}

/// An attempt has ended, and not well.
pub(super) fn end(record: &mut JobRecord, attempt: &Attempt, now: SystemTime) {
    let mut attempt = attempt.clone();
    if attempt.error.len() > MAX_ERROR {
        attempt.error.truncate(attempt.error.floor_char_boundary(MAX_ERROR - 3));
        attempt.error.push_str("...");
    }
    let same = |open: &&mut Attempt| open.task == attempt.task && open.number == attempt.number;
    match record.attempts.iter_mut().rev().find(same) {
        Some(open) => *open = Attempt { time: open.time, ..attempt },
        None => record.attempts.push(Attempt { time: Some(time::timestamp(now)), ..attempt }),
    }
}

#[cfg(test)]
mod tests {
    use efferent_proto::v1::{Error, GenerateRequest, JobState, Model};

    use super::{
        super::transition::{Transition, accepted, apply},
        *,
    };

    fn record() -> JobRecord {
        let now = SystemTime::now();
        accepted("job".to_owned(), GenerateRequest::default(), Model::default(), now, now, 0)
    }

    fn attempt(number: u32, class: FailureClass) -> Attempt {
        let mut attempt = Attempt {
            queue: "hand.sim.batch".to_owned(),
            task: "job.0".to_owned(),
            number,
            worker_id: format!("w{number}"),
            ..Attempt::default()
        };
        attempt.set_class(class);
        attempt
    }

    fn classes(record: &JobRecord) -> Vec<(u32, FailureClass)> {
        record.attempts.iter().map(|attempt| (attempt.number, attempt.class())).collect()
    }

    fn run(record: &mut JobRecord, transition: &Transition) -> bool {
        apply(record, transition, SystemTime::now())
    }

    #[test]
    fn attempts_that_say_nothing_more_were_their_workers_last() {
        use FailureClass::{Unspecified, WorkerLost};
        let mut record = record();
        run(&mut record, &Transition::Rendering { worker_id: "w1".to_owned() });
        let events = record.log.len();
        assert!(run(&mut record, &Transition::Begun(attempt(2, Unspecified))));
        assert_eq!(classes(&record), [(1, WorkerLost), (2, Unspecified)]);
        assert_eq!(record.attempts[0].worker_id, "w1");
        assert_eq!(Tally::of(&record, "job.0").exhausted(), None);
        // Numbers may begin anew when the queue's server has crashed.
        run(&mut record, &Transition::Begun(attempt(2, Unspecified)));
        assert_eq!(classes(&record), [(1, WorkerLost), (2, WorkerLost), (2, Unspecified)]);
        assert!(Tally::of(&record, "job.0").is_suspect());
        run(&mut record, &Transition::Begun(attempt(5, Unspecified)));
        assert_eq!(Tally::of(&record, "job.0").exhausted(), Some(WorkerLost));
        assert_eq!(record.attempts.len(), 3, "the fourth is not made");
        assert_eq!(Tally::of(&record, "job.1"), Tally::default());
        assert_eq!(record.log.len(), events, "attempts are no events");
    }

    #[test]
    fn each_class_has_its_limit_and_what_was_handed_back_counts_for_none() {
        use FailureClass::{EngineCrash, HandedBack, OutOfMemory, Transient, Unspecified};
        for (class, limit) in [(Transient, 5), (OutOfMemory, 3), (EngineCrash, 3), (HandedBack, 99)] {
            let mut record = record();
            let mut made = 0;
            while Tally::of(&record, "job.0").exhausted().is_none() && made < 99 {
                made += 1;
                if made > 1 {
                    run(&mut record, &Transition::Begun(attempt(made, Unspecified)));
                }
                run(&mut record, &Transition::Missed(Attempt { error: "é".repeat(500), ..attempt(made, class) }));
            }
            assert_eq!((class, made), (class, limit));
            assert!(record.attempts.iter().all(|attempt| attempt.class() == class && attempt.error.len() <= MAX_ERROR));
        }
    }

    #[test]
    fn a_job_that_is_over_takes_no_attempt() {
        let mut record = record();
        run(&mut record, &Transition::End { state: JobState::Failed, error: Error::default() });
        assert!(!run(&mut record, &Transition::Begun(attempt(2, FailureClass::Unspecified))));
        assert!(!run(&mut record, &Transition::Missed(attempt(2, FailureClass::Transient))));
    }
}
