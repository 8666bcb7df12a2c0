//! The control signal: what a brain tells a hand. Encoded as `efferent.internal.v1.ControlSignal`.
//!
//! This module turns tensors into streams and back, checking every length, and compares spaces.

use candle_core::{DType, Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlSpace, ControlStream, DType as WireDType, StreamRole},
    v1::ErrorCode,
};

pub use efferent_proto::internal::ControlSignal;

/// The schema that this version writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// Most tokens of a stream.
pub const MAX_TOKENS: u32 = 65_536;

/// Label of the pooled vector of the prompt.
pub const CONDITIONAL: &str = "conditional";
/// Label of the pooled vector of the negative prompt.
pub const UNCONDITIONAL: &str = "unconditional";

/// `pictogram/256/queries16@24/rms#0123abcd`: a space for people to read.
pub fn space_name(space: &ControlSpace) -> String {
    let revision = if space.revision.is_empty() { String::new() } else { format!("#{}", space.revision) };
    format!("{}/{}/{}/{}{revision}", space.family, space.width, space.layers, space.normalisation)
}

/// Refuses a signal that is of another space or schema, naming both.
pub fn check_space(signal: &ControlSignal, accepted: &ControlSpace) -> Result<(), ApiError> {
    let header = signal
        .header
        .as_ref()
        .ok_or_else(|| ApiError::new(ErrorCode::SpaceMismatch, "the control signal has no header"))?;
    if header.schema_version != SCHEMA_VERSION {
        return Err(ApiError::new(
            ErrorCode::SpaceMismatch,
            format!(
                "the control signal has schema version {}, this hand reads {SCHEMA_VERSION}",
                header.schema_version
            ),
        ));
    }
    let given = header.space.clone().unwrap_or_default();
    if &given == accepted {
        return Ok(());
    }
    let (given, accepted) = (space_name(&given), space_name(accepted));
    Err(ApiError::new(
        ErrorCode::SpaceMismatch,
        format!("the control signal is of space {given}, this hand accepts {accepted}"),
    )
    .field("model")
    .limit(accepted))
}

/// A stream from a tensor of (tokens, width), any float type; kept as f32.
pub fn stream(role: StreamRole, branch: Branch, states: &Tensor) -> candle_core::Result<ControlStream> {
    let (tokens, width) = states.dims2()?;
    let values = states.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    // As a plain copy: signals may have millions of values.
    let mut bytes = vec![0; 4 * values.len()];
    bytes.as_chunks_mut::<4>().0.iter_mut().zip(&values).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
    Ok(ControlStream {
        role: role.into(),
        branch: branch.into(),
        tokens: tokens as u32,
        width: width as u32,
        values: bytes.into(),
        dtype: WireDType::F32.into(),
        ..Default::default()
    })
}

/// The stream of a role and branch.
pub fn find(signal: &ControlSignal, role: StreamRole, branch: Branch) -> Option<&ControlStream> {
    signal.streams.iter().find(|s| s.role() == role && s.branch() == branch)
}

/// The values of a stream as f32 (tokens, width). Refuses lengths that do not agree and values that are not finite.
pub fn tensor(stream: &ControlStream, device: &Device) -> Result<Tensor, ApiError> {
    let malformed = |what: String| {
        ApiError::new(ErrorCode::InvalidField, format!("malformed control signal: {what}")).field("signal")
    };
    let (tokens, width) = (stream.tokens as usize, stream.width as usize);
    if stream.tokens == 0 || stream.tokens > MAX_TOKENS || stream.width == 0 || stream.width > MAX_TOKENS {
        return Err(malformed(format!("{tokens} x {width} values")));
    }
    if stream.dtype() != WireDType::F32 {
        return Err(malformed(format!("values of type {}", stream.dtype().as_str_name())));
    }
    if stream.values.len() as u64 != tokens as u64 * width as u64 * 4 {
        return Err(malformed(format!("{} bytes for {tokens} x {width} values", stream.values.len())));
    }
    let values: Vec<f32> = stream.values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    if values.iter().any(|v| !v.is_finite()) {
        return Err(malformed("a value is not finite".to_owned()));
    }
    Tensor::from_vec(values, (tokens, width), device).map_err(|error| malformed(error.to_string()))
}
