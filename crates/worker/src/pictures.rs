//! Files of pictures that requests refer to.

use std::io::Cursor;

use bytes::Bytes;
use efferent_bus::{Bus, read_object};
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, PictureSource, picture_source::Source},
};
use image::{DynamicImage, ImageDecoder as _, ImageReader, Limits, RgbImage};

use crate::engine::EngineError;

/// Longest side of a file's picture, pixels.
const MAX_SIDE: u32 = 16_384;
/// Most bytes that decoding a file may take.
const MAX_MEMORY: u64 = 1 << 30;

/// A file of a request, and the field that brings it.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// `init_image`, `mask` or `reference_images`.
    pub field: &'static str,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// A file that a request refers to, and its hash; the inner error is the task's, the outer one the bus's.
///
/// # Errors
/// If the bus is unavailable.
pub async fn fetch(
    bus: &dyn Bus,
    field: &str,
    source: &PictureSource,
) -> efferent_bus::Result<Result<(String, Bytes), EngineError>> {
    let missing = |what: &str| EngineError::Missing(format!("{field} {what} is not in the object store"));
    // The coordinator has put whatever a request brought.
    let Some(Source::Hash(hash)) = &source.source else { return Ok(Err(missing("of a request"))) };
    let found = read_object(bus, hash).await?;
    Ok(found.map(|bytes| (hash.clone(), bytes)).ok_or_else(|| missing(hash)))
}

/// A file's picture, the right way up.
///
/// # Errors
/// If it is not a PNG, JPEG or WebP, is damaged, or too large.
pub fn decode(file: File<'_>) -> Result<RgbImage, ApiError> {
    let bad = |error: image::ImageError| {
        let message = format!("{} is not a picture that can be read: {error}", file.field);
        ApiError::new(ErrorCode::InvalidField, message).field(file.field).limit("png, jpeg, webp")
    };
    let mut reader = ImageReader::new(Cursor::new(file.bytes)).with_guessed_format().map_err(|e| bad(e.into()))?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    limits.max_alloc = Some(MAX_MEMORY);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(bad)?;
    // Cameras keep pictures as the sensor saw them, and say which side is up.
    let orientation = decoder.orientation().map_err(bad)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(bad)?;
    picture.apply_orientation(orientation);
    Ok(picture.into_rgb8())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(picture: &RgbImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, image::ImageFormat::Png).expect("is written");
        bytes.into_inner()
    }

    #[test]
    fn what_is_no_picture_is_refused_with_its_field() {
        let whole = file(&RgbImage::new(64, 64));
        let mut huge = whole.clone();
        // The width in a PNG's header, whose checksum then is wrong as well.
        huge[16..20].copy_from_slice(&0x7fff_ffffu32.to_be_bytes());
        for bytes in [&b""[..], b"GIF89a", &whole[..whole.len() / 2], &huge] {
            let error = decode(File { field: "mask", bytes }).expect_err("is refused");
            assert_eq!((error.code, error.field.as_str()), (ErrorCode::InvalidField, "mask"));
        }
    }
}
