//! How many tasks a hand holds: as many as are worth having at once, and as many interactive ones again if batch work has their places.
//!
//! Batch work takes only places that nobody has. Interactive work does not count batch work as being there: that is parked for it. An image that
//! is rendered and not yet recorded leaves its place to the next one, so that the engine does not wait for the bus.

use std::sync::Arc;

use efferent_proto::v1::Lane;
use tokio::sync::watch;

/// For each place, at most this many tasks in hand, those counted that are being recorded.
const MOST_IN_HAND: usize = 3;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    interactive: usize,
    batch: usize,
    recording: usize,
}

/// The places of a hand.
#[derive(Debug)]
pub(crate) struct Places {
    /// How many there are.
    limit: watch::Receiver<usize>,
    taken: watch::Sender<Counts>,
}

impl Places {
    /// As many as `limit` says.
    pub(crate) fn new(limit: watch::Receiver<usize>) -> Arc<Self> {
        Arc::new(Self { limit, taken: watch::Sender::new(Counts::default()) })
    }

    /// Waits until there is room for tasks of a lane, and tells for how many.
    pub(crate) async fn room(&self, lane: Lane) -> usize {
        let (mut limit, mut taken) = (self.limit.clone(), self.taken.subscribe());
        loop {
            let room = free(lane, *limit.borrow_and_update(), *taken.borrow_and_update());
            if room > 0 {
                return room;
            }
            tokio::select! {
                Ok(()) = limit.changed() => {}
                Ok(()) = taken.changed() => {}
                else => std::future::pending().await,
            }
        }
    }

    /// Whether any task is held.
    pub(crate) fn is_idle(&self) -> bool {
        *self.taken.borrow() == Counts::default()
    }

    /// Takes a place, until it is dropped.
    pub(crate) fn take(self: &Arc<Self>, lane: Lane) -> Place {
        self.taken.send_modify(|counts| *of(counts, lane) += 1);
        Place { places: self.clone(), lane, recording: false }
    }
}

fn of(counts: &mut Counts, lane: Lane) -> &mut usize {
    if lane == Lane::Batch { &mut counts.batch } else { &mut counts.interactive }
}

fn free(lane: Lane, limit: usize, counts: Counts) -> usize {
    let rendering = if lane == Lane::Batch { counts.interactive + counts.batch } else { counts.interactive };
    let in_hand = counts.interactive + counts.batch + counts.recording;
    limit.saturating_sub(rendering).min((limit * MOST_IN_HAND).saturating_sub(in_hand))
}

/// A place that is taken.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    lane: Lane,
    recording: bool,
}

impl Place {
    /// The image is rendered: another may come.
    pub(crate) fn rendered(&mut self) {
        if !std::mem::replace(&mut self.recording, true) {
            self.places.taken.send_modify(|counts| {
                *of(counts, self.lane) -= 1;
                counts.recording += 1;
            });
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (lane, recording) = (self.lane, self.recording);
        self.places.taken.send_modify(|counts| *if recording { &mut counts.recording } else { of(counts, lane) } -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn interactive_work_finds_room_where_batch_work_finds_none() {
        let (limit, limited) = watch::channel(2);
        let places = Places::new(limited);
        assert!(places.is_idle());
        assert_eq!(places.room(Lane::Batch).await, 2);
        let mut first = places.take(Lane::Batch);
        let _second = places.take(Lane::Batch);
        assert_eq!(places.room(Lane::Batch).now_or_never(), None);
        assert_eq!(places.room(Lane::Interactive).await, 2);
        let urgent = [places.take(Lane::Interactive), places.take(Lane::Interactive)];
        assert_eq!(places.room(Lane::Interactive).now_or_never(), None);
        // A batch image that is rendered makes room for batch work only when interactive work leaves room too.
        first.rendered();
        assert_eq!(places.room(Lane::Batch).now_or_never(), None);
        drop(urgent);
        assert_eq!(places.room(Lane::Batch).await, 1);
        limit.send_replace(3);
        assert_eq!(places.room(Lane::Batch).await, 2);
    }

    #[tokio::test]
    async fn room_is_noticed_and_what_is_being_recorded_is_bounded() {
        let places = Places::new(watch::channel(1).1);
        let mut recording: Vec<Place> = (0..MOST_IN_HAND).map(|_| places.take(Lane::Batch)).collect();
        recording.iter_mut().for_each(Place::rendered);
        let waiting = tokio::spawn({
            let places = places.clone();
            async move { places.room(Lane::Interactive).await }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!waiting.is_finished());
        recording.pop();
        assert_eq!(waiting.await.unwrap(), 1);
    }
}
