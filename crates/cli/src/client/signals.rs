//! `encode` and `signal`: control signals that are kept.

use efferent_proto::{
    time,
    v1::{DeleteSignalRequest, EncodeRequest, GetSignalRequest, Signal, signal_service_client::SignalServiceClient},
};
use serde_json::json;

use crate::{
    args,
    client::{Server, json, pictures},
    exit::Failure,
    output, settings,
};

/// Has a prompt's signal kept and prints its id.
///
/// # Errors
/// If the request is refused, fails, or the server cannot be asked.
pub(crate) async fn encode(
    mut server: Server,
    args: &args::Encode,
    settings: &settings::Client,
) -> Result<(), Failure> {
    let mut request = EncodeRequest {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative.clone().unwrap_or_default(),
        model: settings.model.clone(),
        time_to_live: args.keep.map(time::proto_duration),
        deadline: args.deadline.map(time::proto_duration),
        tenant: settings.tenant.clone(),
        reference_images: pictures::put_each(&mut server, &args.reference_images).await?,
        ..EncodeRequest::default()
    };
    request.set_lane(args.lane.proto());
    let answer = SignalServiceClient::new(server.connect().await?).encode(request).await;
    let signal = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if args.json { output::line(json::signal(&signal)) } else { output::line(&signal.signal_id) }
}

/// Prints what is known of a signal.
///
/// # Errors
/// If there is none of this id.
pub(crate) async fn show(mut server: Server, args: &args::Signal) -> Result<(), Failure> {
    let request = GetSignalRequest { signal_id: args.signal.clone() };
    let answer = SignalServiceClient::new(server.connect().await?).get_signal(request).await;
    let signal = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if args.json {
        return output::line(json::signal(&signal));
    }
    let Signal { signal_id, model, space, length, prompt, expires_at, .. } = &signal;
    let until = expires_at.as_ref().map(time::system_time).unwrap_or(std::time::UNIX_EPOCH);
    output::line(format_args!("{signal_id}  kept until {}", humantime::format_rfc3339_seconds(until)))?;
    output::line(format_args!("  prompt   {prompt:?}"))?;
    output::line(format_args!("  made by  model {model}, {length} bytes"))?;
    output::line(format_args!("  space    {space}"))
}

/// Forgets a signal.
///
/// # Errors
/// If the server cannot be asked.
pub(crate) async fn drop(mut server: Server, args: &args::Signal) -> Result<(), Failure> {
    let request = DeleteSignalRequest { signal_id: args.signal.clone() };
    let answer = SignalServiceClient::new(server.connect().await?).delete_signal(request).await;
    answer.map_err(|status| Failure::status(&status))?;
    if args.json { output::line(json!({ "signal_id": args.signal })) } else { Ok(()) }
}
