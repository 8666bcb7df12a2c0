//! How many tasks a hand holds: as many as are worth having at once, and as many interactive ones again if batch work has their places.
//!
//! Batch work takes only places that nobody has. Interactive work does not count batch work as being there: that is parked for it. An image that
//! is rendered and not yet recorded leaves its place to the next one, so that the engine does not wait for the bus. A task that may take its
//! worker down waits until nothing else is in hand, and nothing else is taken until it is done.

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
    /// Tasks that wait to be alone, and whether one is.
    waiting: usize,
    alone: bool,
}

impl Counts {
    fn in_hand(&self) -> usize {
        self.interactive + self.batch + self.recording
    }
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

    /// Takes a place, until it is dropped.
    pub(crate) fn take(self: &Arc<Self>, lane: Lane) -> Place {
        self.taken.send_modify(|counts| *of(counts, lane) += 1);
        Place { places: self.clone(), lane, stage: Stage::Rendering }
    }
}

fn of(counts: &mut Counts, lane: Lane) -> &mut usize {
    if lane == Lane::Batch { &mut counts.batch } else { &mut counts.interactive }
}

fn free(lane: Lane, limit: usize, counts: Counts) -> usize {
    if counts.alone || counts.waiting > 0 {
        return 0;
    }
    let rendering = if lane == Lane::Batch { counts.interactive + counts.batch } else { counts.interactive };
    limit.saturating_sub(rendering).min((limit * MOST_IN_HAND).saturating_sub(counts.in_hand()))
}

/// A place that is taken.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    lane: Lane,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Rendering,
    Recording,
    Alone,
}

/// One that waits to be alone.
struct Waiting(Arc<Places>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.taken.send_modify(|counts| counts.waiting -= 1);
    }
}

impl Place {
    /// The image is rendered: another may come.
    pub(crate) fn rendered(&mut self) {
        if self.stage == Stage::Rendering {
            self.stage = Stage::Recording;
            self.places.taken.send_modify(|counts| {
                *of(counts, self.lane) -= 1;
                counts.recording += 1;
            });
        }
    }

    /// Gives the place up, and waits until no other is taken.
    pub(crate) async fn alone(self) -> Place {
        let (places, lane) = (self.places.clone(), self.lane);
        drop(self);
        places.taken.send_modify(|counts| counts.waiting += 1);
        let _waiting = Waiting(places.clone());
        let mut taken = places.taken.subscribe();
        loop {
            taken.mark_unchanged();
            let free = places.taken.send_if_modified(|counts| {
                let free = counts.in_hand() == 0 && !counts.alone;
                counts.alone |= free;
                free
            });
            if free {
                return Place { places, lane, stage: Stage::Alone };
            }
            if taken.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Place {
    /// Gives the place up for a while.
    pub(crate) fn leave(self) -> Away {
        Away { places: self.places.clone(), lane: self.lane, alone: self.stage == Stage::Alone }
    }
}

/// A task that has given its place up for a while.
#[derive(Debug)]
pub(crate) struct Away {
    places: Arc<Places>,
    lane: Lane,
    alone: bool,
}

impl Away {
    /// Takes a place as it was, as soon as there is room.
    pub(crate) async fn back(self) -> Place {
        if self.alone {
            return self.places.take(self.lane).alone().await;
        }
        self.places.room(self.lane).await;
        self.places.take(self.lane)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (lane, stage) = (self.lane, self.stage);
        self.places.taken.send_modify(|counts| match stage {
            Stage::Rendering => *of(counts, lane) -= 1,
            Stage::Recording => counts.recording -= 1,
            Stage::Alone => counts.alone = false,
        });
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
    async fn one_that_is_to_be_alone_is() {
        let places = Places::new(watch::channel(2).1);
        let (first, second, third) =
            (places.take(Lane::Batch), places.take(Lane::Batch), places.take(Lane::Interactive));
        let mut waiting = Box::pin(first.alone());
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(places.room(Lane::Interactive).now_or_never(), None, "nothing more is taken");
        drop(third);
        assert!((&mut waiting).now_or_never().is_none());
        // Two that wait do not wait for each other.
        let other = second.alone().now_or_never().expect("the other has given its place up");
        assert!((&mut waiting).now_or_never().is_none());
        drop(other);
        let alone = waiting.await;
        assert_eq!(places.room(Lane::Interactive).now_or_never(), None);
        drop(alone);
        assert_eq!(*places.taken.borrow(), Counts::default());
        assert_eq!(places.room(Lane::Batch).await, 2);
    }

    #[tokio::test]
    async fn who_is_away_takes_no_place_and_finds_one_again() {
        let places = Places::new(watch::channel(1).1);
        let away = places.take(Lane::Interactive).leave();
        let other = places.take(Lane::Interactive);
        let mut back = Box::pin(away.back());
        assert!((&mut back).now_or_never().is_none());
        drop(other);
        let alone = back.await.alone().await;
        let back = alone.leave().back().await;
        assert_eq!(places.room(Lane::Interactive).now_or_never(), None, "it is alone again");
        drop(back);
        assert_eq!(*places.taken.borrow(), Counts::default());
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
