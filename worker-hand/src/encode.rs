//! Pictures to files.

use std::fmt::Write as _;

use bytes::Bytes;
use efferent_proto::{
    internal::HandTask,
    v1::{GenerateRequest, ImageFormat},
    work,
};
use image::{RgbImage, imageops::FilterType};

/// JPEG quality, 1 to 100.
const JPEG_QUALITY: u8 = 92;
/// Most bytes of a preview.
pub const MAX_PREVIEW: usize = 96 * 1024;
/// Longest side of a preview, pixels: an incompressible picture of this size is below [`MAX_PREVIEW`].
const PREVIEW_SIDE: u32 = 160;

/// Why a picture cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// As PNG.
    #[error("cannot encode a PNG")]
    Png(#[from] png::EncodingError),
    /// As something else.
    #[error("cannot encode an image")]
    Image(#[from] image::ImageError),
}

/// The file of a rendered image. PNG carries the generation parameters in the text chunk `parameters`, in the form that tools for
/// generated pictures read; the other formats carry none.
///
/// # Errors
/// If the picture has no pixels or is too large for the format.
pub fn encode(picture: &RgbImage, task: &HandTask) -> Result<Bytes, Error> {
    let request = task.request.clone().unwrap_or_default();
    match request.format() {
        ImageFormat::Unspecified | ImageFormat::Png => Ok(png(picture, Some(&parameters(&request, task)))?.into()),
        ImageFormat::Jpeg => {
            let mut file = Vec::new();
            picture.write_with_encoder(image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY))?;
            Ok(file.into())
        }
        ImageFormat::Webp => {
            let mut file = Vec::new();
            picture.write_with_encoder(image::codecs::webp::WebPEncoder::new_lossless(&mut file))?;
            Ok(file.into())
        }
    }
}

/// A PNG of at most [`MAX_PREVIEW`] bytes.
///
/// # Errors
/// If the picture has no pixels.
pub fn preview(picture: &RgbImage) -> Result<Bytes, Error> {
    let side = picture.width().max(picture.height());
    if side <= PREVIEW_SIDE {
        return Ok(png(picture, None)?.into());
    }
    let scaled = |length: u32| (u64::from(length) * u64::from(PREVIEW_SIDE) / u64::from(side)).max(1) as u32;
    let (width, height) = (scaled(picture.width()), scaled(picture.height()));
    Ok(png(&image::imageops::resize(picture, width, height, FilterType::Triangle), None)?.into())
}

fn png(picture: &RgbImage, parameters: Option<&str>) -> Result<Vec<u8>, png::EncodingError> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // A few per cent larger than the densest, and several times quicker.
    encoder.set_compression(png::Compression::Fast);
    match parameters {
        // The older chunk, which every reader knows, holds Latin-1 only.
        Some(text) if text.is_ascii() => encoder.add_text_chunk("parameters".to_owned(), text.to_owned())?,
        Some(text) => encoder.add_itxt_chunk("parameters".to_owned(), text.to_owned())?,
        None => {}
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(picture.as_raw())?;
    writer.finish()?;
    Ok(file)
}

/// What the picture was made from, enough to make it again.
fn parameters(request: &GenerateRequest, task: &HandTask) -> String {
    let model = task.model.clone().unwrap_or_default();
    let size = request.size.unwrap_or_default();
    // PNG's text has no room for a NUL.
    let mut text = request.prompt.replace('\0', "\u{fffd}");
    if !request.negative_prompt.is_empty() {
        let _ = write!(text, "\nNegative prompt: {}", request.negative_prompt.replace('\0', "\u{fffd}"));
    }
    let mut more = String::new();
    if request.init_image.is_some() {
        let _ = write!(more, "Denoising strength: {}, ", work::strength(request));
    }
    if request.guidance_rescale() > 0.0 {
        let _ = write!(more, "CFG rescale: {}, ", request.guidance_rescale());
    }
    let range = (request.guidance_start.unwrap_or(0.0), request.guidance_stop.unwrap_or(1.0));
    if range != (0.0, 1.0) {
        let _ = write!(more, "CFG range: {}..{}, ", range.0, range.1);
    }
    let _ = write!(
        text,
        "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}x{}, {more}Model: {}, Model hash: {}, Version: efferent {}",
        request.steps(),
        request.sampler,
        request.guidance_scale(),
        task.seed,
        size.width,
        size.height,
        model.name,
        model.revision,
        env!("CARGO_PKG_VERSION"),
    );
    text
}

#[cfg(test)]
mod tests {
    use efferent_proto::v1::{Model, Size};

    use super::*;

    fn task(prompt: &str, format: ImageFormat) -> HandTask {
        let mut request = GenerateRequest {
            prompt: prompt.to_owned(),
            steps: Some(12),
            guidance_scale: Some(2.5),
            sampler: "euler".to_owned(),
            size: Some(Size { width: 40, height: 30 }),
            ..Default::default()
        };
        request.set_format(format);
        let model = Model { name: "m".to_owned(), revision: "0123".to_owned(), ..Default::default() };
        HandTask { request: Some(request), model: Some(model), seed: u64::MAX, ..Default::default() }
    }

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, 7]))
    }

    #[test]
    fn png_carries_the_parameters() {
        for prompt in ["a red apple", "ein Äpfelchen, 苹果", "a\0b"] {
            let file = encode(&picture(), &task(prompt, ImageFormat::Png)).unwrap();
            let mut reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            assert_eq!(&pixels, picture().as_raw());
            let info = reader.info();
            let plain = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
            let wide = info.utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap()));
            let chunks: Vec<_> = plain.chain(wide).collect();
            let wanted = format!(
                "{}\nSteps: 12, Sampler: euler, CFG scale: 2.5, Seed: 18446744073709551615, Size: 40x30, Model: m, \
                 Model hash: 0123, Version: efferent {}",
                prompt.replace('\0', "\u{fffd}"),
                env!("CARGO_PKG_VERSION")
            );
            assert_eq!(chunks, [("parameters".to_owned(), wanted)]);
        }
    }

    #[test]
    fn every_format_is_what_it_says() {
        for (format, kind, exact) in [
            (ImageFormat::Png, image::ImageFormat::Png, true),
            (ImageFormat::Webp, image::ImageFormat::WebP, true),
            (ImageFormat::Jpeg, image::ImageFormat::Jpeg, false),
        ] {
            let file = encode(&picture(), &task("p", format)).unwrap();
            assert_eq!(image::guess_format(&file).unwrap(), kind);
            let read = image::load_from_memory(&file).unwrap().to_rgb8();
            assert_eq!(read.dimensions(), (40, 30));
            assert!(!exact || read == picture());
        }
    }

    #[test]
    fn a_preview_is_small() {
        let mut random = crate::noise::MersenneTwister::new(1);
        for (width, height) in [(1, 1), (160, 160), (1024, 300), (5000, 2)] {
            let noisy = RgbImage::from_fn(width, height, |_, _| {
                image::Rgb(random.next_u32().to_le_bytes()[..3].try_into().unwrap())
            });
            let file = preview(&noisy).unwrap();
            assert!(file.len() <= MAX_PREVIEW, "{width} x {height}: {}", file.len());
        }
    }
}
