//! What control signals say: texts, and what is pooled of them.

use candle_core::{Device, Tensor};
use efferent_proto::internal::{Branch, ControlSignal, ControlStream, StreamRole, UnconditionalPolicy};
use efferent_worker::{
    engine::EngineError,
    signal::{self, CONDITIONAL, UNCONDITIONAL},
};

use super::malformed;

/// What a branch conditions a picture on: the states of a text, or what a connector made of them.
fn stream(signal: &ControlSignal, branch: Branch) -> Result<&ControlStream, EngineError> {
    [StreamRole::Text, StreamRole::Query]
        .into_iter()
        .find_map(|role| signal::find(signal, role, branch))
        .ok_or_else(|| malformed(format!("there is no text stream of {}", branch.as_str_name())))
}

/// The text of a signal on these branches (branches, tokens, width), that with the prompt first.
///
/// # Errors
/// If a branch is missing, or of another width or length.
pub fn text(signal: &ControlSignal, branches: &[Branch], width: usize, device: &Device) -> Result<Tensor, EngineError> {
    let zeros = signal.unconditional() == UnconditionalPolicy::Zeros;
    let find = |branch: Branch| Ok::<_, EngineError>(signal::tensor(stream(signal, branch)?, device)?);
    let positive = find(Branch::Conditional)?;
    if positive.dim(1)? != width {
        return Err(malformed(format!("states of {} channels, the network reads {width}", positive.dim(1)?)));
    }
    let text = |branch: &Branch| match branch {
        Branch::Conditional => Ok(positive.clone()),
        Branch::Unconditional if zeros => Ok(positive.zeros_like()?),
        other => find(*other),
    };
    let texts = branches.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    if texts.iter().any(|text| text.dims() != positive.dims()) {
        return Err(malformed("the text streams differ in length"));
    }
    Ok(Tensor::stack(&texts, 0)?)
}

/// A text, filled up to a number of tokens that others have too.
#[derive(Debug)]
pub struct FilledText {
    /// (1, tokens, width)
    pub states: Tensor,
    /// (1, tokens), 1 for those of the text
    pub present: Tensor,
}

/// A text of a signal, filled up with zeros to a multiple of so many tokens: texts of about the same length share a pass.
///
/// # Errors
/// If the branch is missing, empty, or of another width.
pub fn filled_text(
    signal: &ControlSignal,
    branch: Branch,
    width: usize,
    multiple: usize,
    device: &Device,
) -> Result<FilledText, EngineError> {
    let states = signal::tensor(stream(signal, branch)?, device)?;
    let (tokens, channels) = states.dims2()?;
    if tokens == 0 || channels != width {
        return Err(malformed(format!("{tokens} states of {channels} channels, the network reads some of {width}")));
    }
    let filled = tokens.next_multiple_of(multiple);
    let present: Vec<f32> = (0..filled).map(|token| f32::from(u8::from(token < tokens))).collect();
    Ok(FilledText {
        states: states.pad_with_zeros(0, 0, filled - tokens)?.unsqueeze(0)?,
        present: Tensor::from_vec(present, (1, filled), device)?,
    })
}

/// The pooled text of a signal (branches, width), as [`text`]. Signals with pictures have none.
///
/// # Errors
/// If a branch is missing, of another width, or not finite.
pub fn pooled(
    signal: &ControlSignal,
    branches: &[Branch],
    width: usize,
    device: &Device,
) -> Result<Tensor, EngineError> {
    let zeros = signal.unconditional() == UnconditionalPolicy::Zeros;
    let find = |label: &str| {
        let found = signal.pooled.iter().find(|vector| vector.label == label);
        found.map(|vector| vector.values.clone()).ok_or_else(|| malformed(format!("there is no {label} pooled vector")))
    };
    let vector = |branch: &Branch| match branch {
        Branch::Conditional => find(CONDITIONAL),
        Branch::Unconditional if zeros => Ok(vec![0.0; width]),
        Branch::Unconditional => find(UNCONDITIONAL),
        Branch::ImageConditional => Err(malformed("nothing is pooled of pictures")),
    };
    let vectors = branches.iter().map(vector).collect::<Result<Vec<_>, _>>()?;
    if vectors.iter().any(|vector| vector.len() != width || vector.iter().any(|value| !value.is_finite())) {
        return Err(malformed(format!("a pooled vector is not of {width} finite values")));
    }
    let count = vectors.len();
    Ok(Tensor::from_vec(vectors.concat(), (count, width), device)?)
}
