//! Files of prompts: one item a line, the prompt itself or a JSON object.

use serde::Deserialize;

use crate::v1::{GenerateRequest, ImageFormat, PictureSource, Size, picture_source::Source};

/// A line that is an object.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Line {
    prompt: String,
    negative_prompt: String,
    model: String,
    size: Option<String>,
    steps: Option<u32>,
    guidance_scale: Option<f32>,
    guidance_rescale: Option<f32>,
    guidance_start: Option<f32>,
    guidance_stop: Option<f32>,
    seed: Option<u64>,
    seeds: Vec<u64>,
    signal_id: String,
    image_count: Option<u32>,
    format: Option<String>,
    sampler: String,
    init_image: Option<String>,
    strength: Option<f32>,
    mask: Option<String>,
    reference_images: Vec<String>,
    image_guidance_scale: Option<f32>,
}

/// Two numbers, `0.2..0.8`.
///
/// # Errors
/// What is wrong with it, in words.
pub fn range(text: &str) -> Result<(f32, f32), String> {
    let parts = text.split_once("..").and_then(|(from, to)| Some((from.trim().parse().ok()?, to.trim().parse().ok()?)));
    parts.ok_or_else(|| format!("{text:?} is not a range, which is written 0.2..0.8"))
}

/// A line's request; `model` is that of lines that name none.
///
/// # Errors
/// What is wrong with the line, in words.
pub fn parse(line: &str, model: &str) -> Result<GenerateRequest, String> {
    let line = match line.trim_start().starts_with('{') {
        true => serde_json::from_str::<Line>(line).map_err(|error| error.to_string())?,
        false => Line { prompt: line.trim().to_owned(), ..Line::default() },
    };
    let mut request = GenerateRequest {
        prompt: line.prompt,
        negative_prompt: line.negative_prompt,
        model: if line.model.is_empty() { model.to_owned() } else { line.model },
        size: line.size.as_deref().map(size).transpose()?,
        steps: line.steps,
        guidance_scale: line.guidance_scale,
        guidance_rescale: line.guidance_rescale,
        guidance_start: line.guidance_start,
        guidance_stop: line.guidance_stop,
        seed: line.seed,
        seeds: line.seeds,
        signal_id: line.signal_id,
        image_count: line.image_count,
        sampler: line.sampler,
        init_image: line.init_image.map(picture),
        strength: line.strength,
        mask: line.mask.map(picture),
        reference_images: line.reference_images.into_iter().map(picture).collect(),
        image_guidance_scale: line.image_guidance_scale,
        ..GenerateRequest::default()
    };
    let format = line.format.as_deref().unwrap_or("png");
    let known = match format {
        "png" => ImageFormat::Png,
        "jpg" | "jpeg" => ImageFormat::Jpeg,
        "webp" => ImageFormat::Webp,
        _ => return Err(format!("format {format:?} is none of png, jpeg, webp")),
    };
    request.set_format(known);
    Ok(request)
}

fn picture(hash: String) -> PictureSource {
    PictureSource { source: Some(Source::Hash(hash)) }
}

/// `96x64` in pixels.
///
/// # Errors
/// If it is not that.
pub fn size(text: &str) -> Result<Size, String> {
    let parts = text.split_once(['x', 'X']).and_then(|(w, h)| Some((w.trim().parse().ok()?, h.trim().parse().ok()?)));
    let (width, height) = parts.ok_or_else(|| "a size is WIDTHxHEIGHT in pixels: 96x96".to_owned())?;
    Ok(Size { width, height })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prompts_or_objects() {
        let plain = parse("  a red apple ", "m").unwrap();
        assert_eq!((plain.prompt.as_str(), plain.model.as_str()), ("a red apple", "m"));
        let full =
            parse(r#"{"prompt": "x", "size": "96x64", "seed": 7, "format": "webp", "model": "n"}"#, "m").unwrap();
        assert_eq!((full.seed, full.model.as_str(), full.size.unwrap().height), (Some(7), "n", 64));
        for bad in [r#"{"prompt""#, r#"{"promt": "x"}"#, r#"{"prompt": "x", "size": "96"}"#, r#"{"format": "gif"}"#] {
            assert!(parse(bad, "").is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_two_numbers() {
        assert_eq!(size("96x64"), Ok(Size { width: 96, height: 64 }));
        for bad in ["", "96", "x", "96x", "-1x4", "96x96x3", "99999999999x1"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
