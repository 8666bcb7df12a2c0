//! `efferent top`: what a cluster does, anew every second.

use std::time::Duration;

use console::Term;
use efferent_proto::v1::{Batch, BatchState, Worker, WorkerState};
use tokio::signal::ctrl_c;

use crate::{
    client::{Server, batch, cluster},
    exit::Failure,
    output,
};

/// How often it is shown anew.
const EVERY: Duration = Duration::from_secs(1);
/// Batches that are asked for.
const BATCHES: u32 = 50;
/// Rows of workers and of batches that are shown if the terminal does not say how many it has.
const ROWS: usize = 40;

/// Shows a cluster until Ctrl-C, or once.
///
/// # Errors
/// If the server cannot be asked at first. Later it is asked again, as long as it takes.
pub(crate) async fn run(mut server: Server, once: bool) -> Result<(), Failure> {
    let term = Term::stdout();
    let screen = !once && term.is_term();
    let mut text = page(&mut server, rows(&term)).await?;
    let pressed = ctrl_c();
    tokio::pin!(pressed);
    loop {
        if screen {
            let _ = term.clear_screen();
        }
        output::line(&text)?;
        if once {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = &mut pressed => return Ok(()),
        }
        text = match page(&mut server, rows(&term)).await {
            Ok(text) => text,
            Err(Failure::Told { error, .. }) => {
                server.turn_away();
                format!("no answer: {error:#}")
            }
            Err(failure) => return Err(failure),
        };
    }
}

/// Rows that a table may have, beside the others.
fn rows(term: &Term) -> usize {
    term.size_checked().map_or(ROWS, |(rows, _)| (usize::from(rows) / 3).max(5))
}

async fn page(server: &mut Server, rows: usize) -> Result<String, Failure> {
    let status = cluster::status(server).await?;
    let mut workers = cluster::workers(server).await?;
    // Those that are at work first: of a thousand, only some can be shown.
    let busy = |worker: &Worker| worker.time.map_or(0.0, |time| time.utilisation);
    workers.sort_by(|a, b| {
        let ready = |worker: &Worker| worker.state() == WorkerState::Ready;
        ready(a).cmp(&ready(b)).then(busy(b).total_cmp(&busy(a))).then(a.id.cmp(&b.id))
    });
    let hidden = workers.len().saturating_sub(rows);
    workers.truncate(rows);
    let more = if hidden > 0 { format!("\nand {hidden} more") } else { String::new() };
    let mut batches = batch::batches(server, "", BATCHES).await?;
    let over = |batch: &Batch| matches!(batch.state(), BatchState::Ended | BatchState::Cancelled);
    batches.sort_by_key(over);
    batches.truncate(rows);
    let batches = if batches.is_empty() { String::new() } else { format!("\n\n{}", batch::table(&batches)) };
    Ok(format!("{}\n\n{}{more}{batches}", cluster::status_text(&status), cluster::worker_table(&workers)))
}
