//! Requests: when they come, and what becomes of each.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use efferent_proto::{
    time,
    v1::{GenerateRequest, Image, JobEvent, image_service_client::ImageServiceClient, job_event::Event},
};
use efferent_worker::sim::{self, chance};
use tokio::task::{JoinHandle, JoinSet};
use tonic::transport::Channel;

use crate::{
    bench::args::{self, Arrivals},
    client,
    exit::{Exit, Failure},
};

/// How long a client that was refused waits before its next request.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// A request that no simulated worker should take this long for.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A request and what became of it. Times are seconds since the load began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Job {
    pub(crate) submitted: f64,
    /// Whether it was accepted.
    pub(crate) accepted: bool,
    /// When the client heard of its end, and whether that was a success.
    pub(crate) ended: Option<(f64, bool)>,
    /// Images and ends that were told: one each, or something came twice.
    pub(crate) images: u32,
    pub(crate) ends: u32,
    /// When its image was recorded, and how long rendering took.
    pub(crate) rendered: Option<(f64, f64)>,
    /// Why it was refused, failed or broke off.
    pub(crate) error: Option<String>,
}

/// Requests that are under way.
pub(crate) struct Load {
    shared: Arc<Shared>,
    driver: JoinHandle<()>,
}

struct Shared {
    client: ImageServiceClient<Channel>,
    began: Instant,
    began_at: SystemTime,
    seed: u64,
    steps: u32,
    jobs: Mutex<Vec<Job>>,
}

/// When requests come, in seconds; `None` if they come when others end.
///
/// # Errors
/// If a trace cannot be read.
pub(crate) fn offsets(args: &args::Cluster) -> Result<Option<Vec<f64>>, Failure> {
    let Arrivals::Trace(path) = &args.arrivals else { return Ok(None) };
    let wrong = |exit, error: anyhow::Error| Failure::new(exit, error.context(format!("trace {}", path.display())));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(Exit::File, error.into()))?;
    trace(&text).map(Some).map_err(|line| wrong(Exit::Usage, anyhow::anyhow!("{line:?} is not a time in seconds")))
}

/// A time a line, sorted. The error is the first line that is none.
fn trace(text: &str) -> Result<Vec<f64>, String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let time = |line: &str| line.parse().ok().filter(|time: &f64| time.is_finite() && *time >= 0.0);
    let mut times = lines.map(|line| time(line).ok_or(line.to_owned())).collect::<Result<Vec<f64>, String>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Arrivals at random, `rate` a second, before `end`.
pub(crate) fn poisson(rate: f64, seed: u64, end: f64) -> Vec<f64> {
    let mut now = 0.0;
    let gaps = (0..).map(|index| -(1.0 - chance(&[seed, index])).ln() / rate);
    gaps.map(|gap| {
        now += gap;
        now
    })
    .take_while(|time| *time < end)
    .collect()
}

impl Load {
    /// Begins to send requests, and stops after `time`.
    pub(crate) fn start(
        channel: Channel,
        args: &args::Cluster,
        in_flight: u32,
        offsets: Option<Vec<f64>>,
        time: Duration,
    ) -> Self {
        let shared = Arc::new(Shared {
            client: client::images(channel),
            began: Instant::now(),
            began_at: SystemTime::now(),
            seed: args.seed,
            steps: args.steps,
            jobs: Mutex::default(),
        });
        let end = time.as_secs_f64();
        let offsets = match &args.arrivals {
            Arrivals::Poisson(rate) => Some(poisson(*rate, args.seed, end)),
            _ => offsets,
        };
        let owned = shared.clone();
        let driver = tokio::spawn(async move {
            match offsets {
                Some(offsets) => owned.open(offsets, end).await,
                None => owned.closed(in_flight, end).await,
            }
        });
        Self { shared, driver }
    }

    /// Seconds since it began.
    pub(crate) fn now(&self) -> f64 {
        self.shared.now()
    }

    /// Waits until every request has ended, at most so long. Returns all that were sent.
    pub(crate) async fn finish(mut self, patience: Duration) -> Vec<Job> {
        if tokio::time::timeout(patience, &mut self.driver).await.is_err() {
            self.driver.abort();
        }
        std::mem::take(&mut *self.shared.jobs.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shared {
    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Sends each request at its time, whatever became of the others.
    async fn open(self: Arc<Self>, offsets: Vec<f64>, end: f64) {
        let mut running = JoinSet::new();
        for offset in offsets.into_iter().take_while(|offset| *offset < end) {
            let at = self.began + Duration::try_from_secs_f64(offset).unwrap_or_default();
            tokio::time::sleep_until(at.into()).await;
            running.spawn(self.clone().send());
            while running.try_join_next().is_some() {}
        }
        running.join_all().await;
    }

    /// Keeps so many requests open.
    async fn closed(self: Arc<Self>, in_flight: u32, end: f64) {
        let mut clients = JoinSet::new();
        for _ in 0..in_flight {
            clients.spawn(self.clone().client(end));
        }
        clients.join_all().await;
    }

    /// Sends one request after the other.
    async fn client(self: Arc<Self>, end: f64) {
        while self.now() < end {
            if !self.clone().send().await {
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
        }
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut Job)) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get_mut(index) {
            change(job);
        }
    }

    /// Sends a request and follows it to its end. Whether it was accepted.
    async fn send(self: Arc<Self>) -> bool {
        let index = {
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            jobs.push(Job { submitted: self.now(), ..Job::default() });
            jobs.len() - 1
        };
        let request = GenerateRequest {
            model: sim::NAME.to_owned(),
            // Every prompt is a new one: a cached control signal would cost the brain nothing.
            prompt: format!("{} {index}", self.seed),
            seed: Some(self.seed.wrapping_add(index as u64)),
            steps: Some(self.steps),
            deadline: Some(time::proto_duration(DEADLINE)),
            ..Default::default()
        };
        let failed = |error: String| self.update(index, |job| job.error = Some(error));
        let mut events = match self.client.clone().generate(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                failed(format!("{:?}: {}", status.code(), status.message()));
                return false;
            }
        };
        loop {
            match events.message().await {
                Ok(Some(event)) => self.hear(index, event),
                Ok(None) => return true,
                Err(status) => {
                    failed(format!("{:?}: {}", status.code(), status.message()));
                    return true;
                }
            }
        }
    }

    fn hear(&self, index: usize, event: JobEvent) {
        let now = self.now();
        let at = event.time.as_ref().map(|at| time::system_time(at).duration_since(self.began_at).unwrap_or_default());
        self.update(index, |job| match event.event {
            Some(Event::Accepted(_)) => job.accepted = true,
            Some(Event::Image(Image { render_time, .. })) => {
                let spent = render_time.as_ref().and_then(time::duration).unwrap_or_default();
                job.images += 1;
                job.rendered = at.map(|at| (at.as_secs_f64(), spent.as_secs_f64()));
            }
            Some(Event::Done(_)) => {
                job.ends += 1;
                job.ended = Some((now, true));
            }
            Some(Event::Failed(ended)) => {
                job.ends += 1;
                job.ended = Some((now, false));
                job.error = Some(ended.error.map(|error| error.message).unwrap_or_default());
            }
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_arrivals_come_at_their_rate_and_irregularly() {
        let times = poisson(50.0, 3, 100.0);
        assert!((4700..5300).contains(&times.len()), "{}", times.len());
        assert!(times.windows(2).all(|pair| pair[0] <= pair[1]) && times.iter().all(|time| *time < 100.0));
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        // Of exponential gaps 63 % are shorter than the mean.
        let short = gaps.iter().filter(|gap| **gap < 0.02).count() as f64 / gaps.len() as f64;
        assert!((short - 0.632).abs() < 0.03, "{short}");
        assert_eq!(times, poisson(50.0, 3, 100.0));
    }

    #[test]
    fn a_trace_is_times_in_any_order() {
        assert_eq!(trace("# seconds\n2\n\n 0.5 \n1e1"), Ok(vec![0.5, 2.0, 10.0]));
        for bad in ["x", "-1", "inf", "1 2"] {
            assert_eq!(trace(bad), Err(bad.to_owned()));
        }
    }
}
