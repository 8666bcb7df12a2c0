//! Notices when an engine does not come back: a kernel that never ends, a driver that waits for ever. Nothing can stop a thread, so whoever
//! watches ends the process; the lease of what it had in hand runs out, and another worker takes it on.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use image::RgbImage;

use crate::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    signal::ControlSignal,
    thread::Factory,
};

/// An engine does not come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hang {
    /// It was in one call for longer than it may.
    #[error("the engine has not come back from a step for {}", humantime::format_duration(Duration::from_secs(after.as_secs().max(1))))]
    Call {
        /// For how long.
        after: Duration,
    },
    /// It crashed and cannot be built anew. Its thread knows this, not the watchdog.
    #[error("the engine crashed and cannot be built anew")]
    Gone,
}

/// Knows since when an engine is in the call that it is in.
#[derive(Debug, Clone, Default)]
pub struct Watchdog(Arc<Mutex<Option<Instant>>>);

impl Watchdog {
    /// Watches the hands that a factory makes. Their loading may take as long as it takes.
    pub fn hand(&self, mut factory: Factory<dyn Hand>) -> Factory<dyn Hand> {
        let watchdog = self.clone();
        Box::new(move || Ok(Box::new(Watched { engine: factory()?, watchdog: watchdog.clone() })))
    }

    /// Watches the brains that a factory makes.
    pub fn brain(&self, mut factory: Factory<dyn Brain>) -> Factory<dyn Brain> {
        let watchdog = self.clone();
        Box::new(move || Ok(Box::new(Watched { engine: factory()?, watchdog: watchdog.clone() })))
    }

    /// Waits until the engine is in one call for longer than `limit`; for ever if that is zero.
    pub async fn hangs(&self, limit: Duration) -> Hang {
        if limit.is_zero() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep((limit / 8).min(Duration::from_secs(1))).await;
            let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(after) = since.map(|since| since.elapsed()).filter(|after| *after > limit) {
                return Hang::Call { after };
            }
        }
    }

    fn begin(&self) -> Call<'_> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Call(self)
    }
}

/// A call that the engine is in; over when it is dropped, also by a panic.
struct Call<'a>(&'a Watchdog);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

struct Watched<E: ?Sized> {
    engine: Box<E>,
    watchdog: Watchdog,
}

impl Brain for Watched<dyn Brain> {
    fn spec(&self) -> &EngineSpec {
        self.engine.spec()
    }

    fn fingerprint(&self) -> String {
        self.engine.fingerprint()
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        self.engine.tokens(request)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let _call = self.watchdog.begin();
        self.engine.embed(batch)
    }
}

impl Hand for Watched<dyn Hand> {
    fn spec(&self) -> &EngineSpec {
        self.engine.spec()
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        let _call = self.watchdog.begin();
        self.engine.begin(request)
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let _call = self.watchdog.begin();
        self.engine.step(batch)
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        let _call = self.watchdog.begin();
        self.engine.preview(sample)
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        let _call = self.watchdog.begin();
        self.engine.finish(sample)
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        let _call = self.watchdog.begin();
        self.engine.checkpoint(sample)
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        let _call = self.watchdog.begin();
        self.engine.resume(request, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_call_that_takes_too_long_is_a_hang() {
        let watchdog = Watchdog::default();
        let limit = Duration::from_millis(200);
        let soon = Duration::from_millis(600);
        assert!(tokio::time::timeout(soon, watchdog.hangs(limit)).await.is_err(), "nothing is done");
        let call = watchdog.begin();
        assert!(tokio::time::timeout(soon, watchdog.hangs(Duration::ZERO)).await.is_err(), "nobody is to notice");
        assert!(matches!(watchdog.hangs(limit).await, Hang::Call { after } if after >= limit));
        drop(call);
        assert!(tokio::time::timeout(soon, watchdog.hangs(limit)).await.is_err(), "the call is over");
    }
}
