//! What may follow what in a job's life: ACCEPTED -> CONDITIONING -> RENDERING -> SUCCEEDED | FAILED | CANCELLED | EXPIRED.

use std::time::SystemTime;

use efferent_proto::{
    internal::JobRecord,
    time,
    v1::{
        Attempt, Conditioning, Done, Encoded, Error, Failed, GenerateRequest, Image, Job, JobEvent, JobState, Model,
        Queued, Rendering, job_event::Event,
    },
};

use super::attempts;

/// A change of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Transition {
    /// A brain has taken it.
    Conditioning {
        /// Which.
        worker_id: String,
    },
    /// A hand has taken one of its images.
    Rendering {
        /// Which.
        worker_id: String,
    },
    /// One of its images is recorded. With the last one, the job has succeeded.
    Image(Image),
    /// Its control signal is kept under this id, which is all that it was to do.
    Encoded(String),
    /// One of its tasks, delivered before, is begun again.
    Begun(Attempt),
    /// An attempt at one of its tasks has ended, and not well.
    Missed(Attempt),
    /// It ends without all of its images.
    End {
        /// `Failed`, `Cancelled` or `Expired`.
        state: JobState,
        /// Why.
        error: Error,
    },
}

/// Whether nothing follows this state.
pub fn is_final(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::Expired)
}

/// Whether a job has ended.
pub fn has_ended(record: &JobRecord) -> bool {
    record.job.as_ref().is_some_and(|job| is_final(job.state()))
}

/// The record of a job that is being accepted, and whose task will be in a queue of about `depth` tasks. `request` has every default filled in.
pub fn accepted(
    job_id: String,
    request: GenerateRequest,
    model: Model,
    now: SystemTime,
    expires_at: SystemTime,
    depth: u64,
) -> JobRecord {
    use efferent_proto::v1::Accepted;
    let job = Job {
        job_id,
        request: Some(request.clone()),
        created_at: Some(time::timestamp(now)),
        expires_at: Some(time::timestamp(expires_at)),
        ..Default::default()
    };
    let mut record = JobRecord { job: Some(job), model: Some(model), ..JobRecord::default() };
    let expires_at = Some(time::timestamp(expires_at));
    append(
        &mut record,
        JobState::Accepted,
        Event::Accepted(Accepted { request: Some(request), expires_at, existing: false }),
        now,
    );
    append(&mut record, JobState::Accepted, Event::Queued(Queued { depth }), now);
    record
}

/// Applies a transition. False if it changes nothing: it happened before, or the job has gone past it.
pub fn apply(record: &mut JobRecord, transition: &Transition, now: SystemTime) -> bool {
    let Some(job) = &record.job else { return false };
    let state = job.state();
    if is_final(state) {
        return false;
    }
    match transition {
        Transition::Conditioning { worker_id } => {
            if state != JobState::Accepted {
                return false;
            }
            append(
                record,
                JobState::Conditioning,
                Event::Conditioning(Conditioning { worker_id: worker_id.clone() }),
                now,
            );
        }
        Transition::Rendering { worker_id } => {
            if state == JobState::Rendering {
                return false;
            }
            append(record, JobState::Rendering, Event::Rendering(Rendering { worker_id: worker_id.clone() }), now);
        }
        Transition::Image(image) => {
            if images(record).any(|known| known.image_index == image.image_index) {
                return false;
            }
            let kept = Image { data: Default::default(), ..image.clone() };
            append(record, JobState::Rendering, Event::Image(kept), now);
            let wanted = record
                .job
                .as_ref()
                .and_then(|job| job.request.as_ref())
                .map_or(1, |request| request.image_count().max(1));
            if images(record).count() as u64 >= u64::from(wanted) {
                succeed(record, wanted, now);
            }
        }
        Transition::Encoded(signal_id) => {
            append(record, state, Event::Encoded(Encoded { signal_id: signal_id.clone() }), now);
            if let Some(job) = &mut record.job {
                job.signal_id.clone_from(signal_id);
            }
            succeed(record, 0, now);
        }
        Transition::Begun(attempt) => attempts::begin(record, attempt, now),
        Transition::Missed(attempt) => attempts::end(record, attempt, now),
        Transition::End { state, error } => {
            append(record, *state, Event::Failed(Failed { state: (*state).into(), error: Some(error.clone()) }), now);
            if let Some(job) = &mut record.job {
                job.error = Some(error.clone());
            }
        }
    }
    true
}

/// Images in the log.
pub fn images(record: &JobRecord) -> impl Iterator<Item = &Image> {
    record.log.iter().filter_map(|event| match &event.event {
        Some(Event::Image(image)) => Some(image),
        _ => None,
    })
}

/// The job as clients see it: with its images in the order of their index.
pub fn public_job(record: &JobRecord) -> Job {
    let mut job = record.job.clone().unwrap_or_default();
    job.images = images(record).cloned().collect();
    job.images.sort_by_key(|image| image.image_index);
    job
}

fn succeed(record: &mut JobRecord, image_count: u32, now: SystemTime) {
    let started = record.job.as_ref().and_then(|job| job.created_at.as_ref()).map_or(now, time::system_time);
    let total_time = Some(time::proto_duration(now.duration_since(started).unwrap_or_default()));
    append(record, JobState::Succeeded, Event::Done(Done { image_count, total_time }), now);
}

fn append(record: &mut JobRecord, state: JobState, event: Event, now: SystemTime) {
    let number = record.log.len() as u64 + 1;
    let Some(job) = &mut record.job else { return };
    job.set_state(state);
    job.last_event = number;
    if is_final(state) {
        job.finished_at = Some(time::timestamp(now));
    }
    let job_id = job.job_id.clone();
    record.log.push(JobEvent { job_id, number, time: Some(time::timestamp(now)), event: Some(event) });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(image_count: u32) -> JobRecord {
        let now = SystemTime::now();
        let request = GenerateRequest { image_count: Some(image_count), ..Default::default() };
        accepted("job".to_owned(), request, Model::default(), now, now, 0)
    }

    fn image(image_index: u32) -> Transition {
        Transition::Image(Image { image_index, ..Default::default() })
    }

    fn run(record: &mut JobRecord, transitions: &[Transition]) -> Vec<bool> {
        transitions.iter().map(|transition| apply(record, transition, SystemTime::now())).collect()
    }

    #[test]
    fn a_job_succeeds_with_its_last_image_and_never_changes_again() {
        let mut record = job(2);
        let worker_id = String::new();
        let taken = Transition::Rendering { worker_id: worker_id.clone() };
        let late = Transition::Conditioning { worker_id };
        let changed =
            run(&mut record, &[late.clone(), taken.clone(), taken, late, image(1), image(1), image(0), image(0)]);
        assert_eq!(changed, [true, true, false, false, true, false, true, false]);
        let state = JobState::Cancelled;
        assert!(!apply(&mut record, &Transition::End { state, error: Error::default() }, SystemTime::now()));
        let job = public_job(&record);
        assert_eq!(job.state(), JobState::Succeeded);
        assert_eq!(job.images.iter().map(|image| image.image_index).collect::<Vec<_>>(), [0, 1]);
        assert!(job.finished_at.is_some());
        assert!(record.log.iter().zip(1..).all(|(event, number)| event.number == number), "numbers have no gaps");
        assert_eq!(job.last_event, record.log.len() as u64);
    }

    #[test]
    fn a_job_that_only_encodes_ends_with_its_signal() {
        let mut record = job(1);
        assert_eq!(run(&mut record, &[Transition::Encoded("id".to_owned()), image(0)]), [true, false]);
        let job = public_job(&record);
        assert_eq!((job.state(), job.signal_id.as_str(), job.images.len()), (JobState::Succeeded, "id", 0));
    }

    #[test]
    fn an_ended_job_takes_no_image() {
        let mut record = job(1);
        let end = Transition::End { state: JobState::Expired, error: Error::default() };
        assert_eq!(run(&mut record, &[end, image(0)]), [true, false]);
        assert_eq!(public_job(&record).state(), JobState::Expired);
    }
}
