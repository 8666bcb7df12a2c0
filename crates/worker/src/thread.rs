//! The OS thread that owns a brain: async code sends it closures and awaits their results.
//!
//! A panic in a closure is caught, told to the caller, and the engine is built anew: its insides may be broken. (A hand has a
//! thread of its own kind, which steps a running batch: `efferent_hand::engine_loop`.) If that fails, as it does when the device is lost, the
//! thread ends, and with it the worker.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::engine::EngineError;

type Job<E> = Box<dyn FnOnce(&mut E) -> Option<String> + Send>;

/// Builds an engine; called again after a panic.
pub type Factory<E> = Box<dyn FnMut() -> Result<Box<E>, EngineError> + Send>;

/// A handle to an engine on its own thread. The thread ends when the last handle is dropped.
pub struct EngineThread<E: ?Sized> {
    jobs: mpsc::Sender<Job<E>>,
    ended: CancellationToken,
}

impl<E: ?Sized> Clone for EngineThread<E> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), ended: self.ended.clone() }
    }
}

impl<E: ?Sized> std::fmt::Debug for EngineThread<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineThread")
    }
}

impl<E: ?Sized + 'static> EngineThread<E> {
    /// Starts the thread and builds the engine on it. Returns once it is loaded.
    ///
    /// # Errors
    /// If the engine cannot be built, or the thread cannot be started.
    pub async fn start(name: &str, mut factory: Factory<E>) -> Result<Self, EngineError> {
        let (jobs, inbox) = mpsc::channel::<Job<E>>();
        let (loaded, wait) = oneshot::channel();
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut engine = match build(&mut factory) {
                    Ok(engine) => {
                        let _ = loaded.send(Ok(()));
                        engine
                    }
                    Err(error) => {
                        let _ = loaded.send(Err(error));
                        return;
                    }
                };
                // Dropped before the engine is, which may take long if its device is lost.
                let _end = end;
                while let Ok(job) = inbox.recv() {
                    if let Some(message) = job(engine.as_mut()) {
                        tracing::error!(message, "the engine panicked; building it anew");
                        match build(&mut factory) {
                            Ok(fresh) => engine = fresh,
                            Err(error) => {
                                tracing::error!(%error, "the engine cannot be built anew; its thread ends");
                                return;
                            }
                        }
                    }
                }
            })
            .map_err(|error| EngineError::compute("starting the engine's thread", error))?;
        wait.await.unwrap_or_else(|_| Err(EngineError::Crashed("panicked while loading".to_owned())))?;
        Ok(Self { jobs, ended })
    }

    /// Runs a closure on the engine's thread, after those that were sent before.
    ///
    /// # Errors
    /// [`EngineError::Crashed`] if it panics, [`EngineError::Gone`] if the engine is gone for good.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut E) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        let job: Job<E> = Box::new(move |engine| match catch_unwind(AssertUnwindSafe(|| work(engine))) {
            Ok(value) => {
                let _ = reply.send(Ok(value));
                None
            }
            Err(panic) => {
                let message = panic_message(panic.as_ref());
                let _ = reply.send(Err(EngineError::Crashed(message.clone())));
                Some(message)
            }
        });
        self.jobs.send(job).map_err(|_| EngineError::Gone)?;
        answer.await.unwrap_or(Err(EngineError::Gone))
    }

    /// Waits until the thread has ended: while there is a handle, because the engine is gone for good.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ended.clone().cancelled_owned()
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.is_cancelled()
    }
}

fn build<E: ?Sized>(factory: &mut Factory<E>) -> Result<Box<E>, EngineError> {
    catch_unwind(AssertUnwindSafe(factory))
        .unwrap_or_else(|panic| Err(EngineError::Crashed(panic_message(panic.as_ref()))))
}

/// What a panic said.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_and_the_engine_built_anew() {
        let mut built = 0;
        let engine = EngineThread::<u32>::start(
            "test",
            Box::new(move || {
                built += 1;
                Ok(Box::new(built * 100))
            }),
        )
        .await
        .unwrap();
        assert_eq!(
            engine
                .run(|n| {
                    *n += 1;
                    *n
                })
                .await
                .unwrap(),
            101
        );
        let error = engine.run(|_| -> u32 { panic!("broken") }).await.unwrap_err();
        assert!(matches!(error, EngineError::Crashed(message) if message == "broken"));
        assert_eq!(engine.run(|n| *n).await.unwrap(), 200);
    }

    #[tokio::test]
    async fn an_engine_that_cannot_be_built_anew_is_gone() {
        let mut built = 0;
        let factory = move || {
            built += 1;
            if built > 1 { Err(EngineError::Missing("no device".to_owned())) } else { Ok(Box::new(0)) }
        };
        let engine = EngineThread::<u32>::start("test", Box::new(factory)).await.unwrap();
        assert!(!engine.has_ended());
        let error = engine.run(|_| -> u32 { panic!("broken") }).await.unwrap_err();
        assert!(matches!(error, EngineError::Crashed(message) if message == "broken"), "it counts for who was at work");
        engine.ended().await;
        assert!(matches!(engine.run(|n| *n).await, Err(EngineError::Gone)) && engine.has_ended());
    }

    #[tokio::test]
    async fn an_engine_that_cannot_be_built_is_an_error() {
        let failed = EngineThread::<u32>::start("test", Box::new(|| panic!("no weights"))).await;
        assert!(matches!(failed, Err(EngineError::Crashed(message)) if message == "no weights"));
    }
}
