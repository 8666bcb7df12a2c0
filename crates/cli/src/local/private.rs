//! `generate` without a server: the same way as with one, from the gRPC call to the queue and back, in this process and on a queue of
//! its own. So two of them do not get in each other's way, and nothing is left afterwards.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use efferent_bus::ledger::Ledger;
use efferent_service::Shutdown;
use tokio::net::TcpListener;

use crate::{
    args,
    client::{self, Server, files::Plan, follow::Follow, generate, progress::Progress},
    exit::{Exit, Failure},
    local::{
        engines::Engines,
        serve::{Role, Services, embedded, provide_weights},
    },
    settings::{Client, Settings},
};

/// How often to ask whether the model is served.
const LIVE_POLL: Duration = Duration::from_millis(5);

/// Draws a prompt.
///
/// # Errors
/// If the configuration is wrong, weights cannot be had, the request is refused, or the job ends without all images.
pub(crate) async fn run(
    settings: &Settings,
    args: &args::Generate,
    plan: &Plan,
    progress: Progress,
) -> Result<(), Failure> {
    let engines = Arc::new(Engines::open(settings, "generate")?);
    provide_weights(&engines, settings).await?;
    progress.stage("loading the model");
    let fault = |what: &'static str| move |error| Failure::new(Exit::File, anyhow::Error::new(error).context(what));
    let folder =
        tempfile::Builder::new().prefix("efferent-").tempdir().map_err(fault("cannot make a temporary folder"))?;
    let bus = embedded(folder.path()).await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(fault("cannot listen on the loopback"))?;
    let address = listener.local_addr().map_err(fault("cannot listen on the loopback"))?;
    let mut services = Services::new(Ledger::new(bus, settings.local.ledger.options()), Shutdown::new());
    services.coordinator(&settings.local, listener);
    for role in [Role::Brain, Role::Hand] {
        services.worker(role, &settings.local, &engines);
    }
    let mut server = Server::parse(&address.to_string())?;
    let loading = |(read, all): (u64, u64)| {
        if read < all {
            progress.stage(format!("loading the model, {} % of {:.1} GB", read * 100 / all, all as f64 / 1e9));
        }
    };
    services.ready(loading).await?;
    tokio::select! {
        live = live(&mut server, engines.name()) => live?,
        failure = services.broken() => return Err(failure),
    }
    let client = Client { model: engines.name().to_owned(), ..settings.client.clone() };
    let request = generate::request(&mut server, args, &client, plan).await?;
    let follow = Follow::submit(server, request);
    progress.stage("submitting");
    generate::run(follow, args, plan, progress, services.broken()).await
}

/// Waits until the coordinator has heard of both workers.
async fn live(server: &mut Server, model: &str) -> Result<(), Failure> {
    loop {
        let models = client::cluster::models(server).await?;
        if models.iter().any(|known| known.name == model && known.live_brains > 0 && known.live_hands > 0) {
            return Ok(());
        }
        tokio::time::sleep(LIVE_POLL).await;
    }
}
