//! What a person sees while a job runs: a bar with stage, steps and time left on stderr, and pictures in the terminal.
//!
//! The bar is drawn only if stderr is a terminal, pictures only if stdout is one.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, stdout},
    time::Duration,
};

use efferent_proto::{
    v1::{GenerateRequest, JobEvent, job_event::Event},
    work,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{
    client::terminal::{self, Protocol},
    output,
};

/// Columns that a picture takes at most: with two pixels to a character, 24 rows of a square one.
const PICTURE_COLUMNS: u32 = 48;
const PREVIEW_COLUMNS: u32 = 24;

/// The bar.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    images: u64,
    /// Steps done, by image.
    steps: BTreeMap<u32, u32>,
    /// How pictures are shown, if they are.
    pictures: Option<Protocol>,
}

impl Progress {
    /// A bar that tells of a stage, and pictures if `pictures` and stdout is a terminal that can show any.
    pub(crate) fn new(stage: &'static str, pictures: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {msg} {elapsed}"));
        bar.set_message(stage);
        bar.enable_steady_tick(Duration::from_millis(100));
        let can_show = pictures && stdout().is_terminal();
        let pictures = can_show.then(|| terminal::protocol(|name| std::env::var(name).ok())).flatten();
        Self { bar, images: 1, steps: BTreeMap::new(), pictures }
    }

    /// Tells of another stage.
    pub(crate) fn stage(&self, stage: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(stage);
    }

    /// Shows what happened.
    pub(crate) fn event(&mut self, event: &JobEvent) {
        match &event.event {
            Some(Event::Accepted(accepted)) => {
                let request = accepted.request.as_ref();
                self.images = request.map_or(1, GenerateRequest::image_count).max(1).into();
                let steps = u64::from(request.map_or(0, work::steps));
                self.bar.set_length(steps * self.images);
                self.stage("accepted");
            }
            Some(Event::Queued(queued)) => self.stage(format!("waiting, {} in the queue", queued.depth)),
            Some(Event::Conditioning(_)) => self.stage("reading the prompt"),
            Some(Event::Rendering(_)) => {
                self.bar.set_style(style("{msg} [{bar:30}] step {pos} of {len}, {eta} left"));
                self.bar.reset_eta();
                self.drawing();
            }
            Some(Event::Step(step)) => {
                self.steps.insert(step.image_index, step.step);
                // Of a picture that begins with another, fewer are made than were asked for; how many exactly, its hand knows.
                self.bar.set_length(u64::from(step.steps) * self.images);
                self.advance();
            }
            Some(Event::Preview(preview)) => self.picture(&preview.png, PREVIEW_COLUMNS),
            Some(Event::Image(image)) => {
                let all = self.bar.length().unwrap_or(0) / self.images;
                self.steps.insert(image.image_index, all as u32);
                self.advance();
                self.drawing();
            }
            Some(Event::Done(_) | Event::Failed(_)) => self.clear(),
            Some(Event::Encoded(_) | Event::Detached(_)) | None => {}
        }
    }

    fn drawing(&self) {
        match self.images {
            1 => self.stage("drawing"),
            images => self.stage(format!("drawing {images} images")),
        }
    }

    fn advance(&self) {
        self.bar.set_position(self.steps.values().map(|steps| u64::from(*steps)).sum());
    }

    /// Shows a picture, if it can be shown here.
    pub(crate) fn show(&self, data: &[u8]) {
        self.picture(data, PICTURE_COLUMNS);
    }

    fn picture(&self, data: &[u8], columns: u32) {
        let Some(protocol) = self.pictures else { return };
        // A picture that cannot be shown is still in its file.
        let Ok(picture) = image::load_from_memory(data) else { return };
        let shown = terminal::show(&picture, columns.min(terminal::columns()).max(1), protocol);
        self.bar.suspend(|| drop(output::bytes(shown.as_bytes())));
    }

    /// Runs something that writes to the terminal.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    /// Takes the bar away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A bar for a download.
#[cfg(feature = "local")]
pub(crate) fn download(message: String) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(style("{spinner} {msg} {bytes}"));
    bar.set_message(message);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Shows how far a download is.
#[cfg(feature = "local")]
pub(crate) fn downloaded(bar: &ProgressBar, bytes: u64, total: u64) {
    if bar.length().is_none() {
        bar.set_length(total);
        bar.set_style(style("{msg} [{bar:30}] {bytes} of {total_bytes}, {eta} left"));
    }
    bar.set_position(bytes);
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}
