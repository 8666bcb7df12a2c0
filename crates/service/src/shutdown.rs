//! The stop signal, handed down from `main`.

use std::future::Future;

use tokio_util::sync::CancellationToken;

/// A stop signal that can be cloned, waited for and triggered. Children stop with their parent, not the other way round.
#[derive(Debug, Clone, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// A signal that nobody has given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A signal that is given on SIGINT or SIGTERM. A second SIGINT ends the process at once, as the handler is gone by then.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let shutdown = Self::new();
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let given = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            tracing::info!("stopping");
            given.trigger();
            // Tokio keeps the handler for ever, so a second signal must be acted upon here.
            let _ = interrupt.recv().await;
            std::process::abort();
        });
        Ok(shutdown)
    }

    /// Gives the signal. Again is fine.
    pub fn trigger(&self) {
        self.0.cancel();
    }

    /// Whether it was given.
    pub fn is_triggered(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Waits until it is given.
    pub fn requested(&self) -> impl Future<Output = ()> + Send + 'static {
        self.0.clone().cancelled_owned()
    }

    /// A signal that is given with this one, and can be given without it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
    }
}
