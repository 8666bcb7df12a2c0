//! Files that a request brings, to pictures of the size that is to be drawn.

use std::io::Cursor;

use efferent_proto::{
    ApiError,
    v1::{ErrorCode, Size},
};
use efferent_worker::engine::Picture;
use image::{
    DynamicImage, GrayImage, ImageDecoder as _, ImageReader, Limits, RgbImage,
    imageops::{self, FilterType},
};

/// Longest side of a file's picture, pixels.
const MAX_SIDE: u32 = 16_384;
/// Most bytes that decoding a file may take.
const MAX_MEMORY: u64 = 1 << 30;

/// A file of a request, and the field that brings it.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// `init_image` or `mask`.
    pub field: &'static str,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// What to begin with.
///
/// # Errors
/// If a file is not a PNG, JPEG or WebP, is damaged, or too large.
pub fn picture(image: File<'_>, mask: Option<File<'_>>, size: Size, strength: f64) -> Result<Picture, ApiError> {
    let image = scaled(decode(image)?.to_rgb8(), size);
    let mask =
        mask.map(|file| Ok::<_, ApiError>(black_or_white(&scaled(decode(file)?.to_rgb8(), size)))).transpose()?;
    Ok(Picture { image, mask, strength })
}

fn decode(file: File<'_>) -> Result<DynamicImage, ApiError> {
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
    Ok(picture)
}

fn scaled(picture: RgbImage, size: Size) -> RgbImage {
    match picture.dimensions() == (size.width, size.height) {
        true => picture,
        false => imageops::resize(&picture, size.width, size.height, FilterType::Lanczos3),
    }
}

/// By ITU-R 601-2, as Pillow weighs colours, in its integers.
fn black_or_white(mask: &RgbImage) -> GrayImage {
    let light = |[red, green, blue]: [u8; 3]| {
        (u32::from(red) * 19_595 + u32::from(green) * 38_470 + u32::from(blue) * 7_471 + 0x8000) >> 16
    };
    let values = mask.pixels().map(|pixel| if light(pixel.0) >= 128 { 255 } else { 0 }).collect();
    GrayImage::from_raw(mask.width(), mask.height(), values).unwrap_or_default()
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
    fn files_become_pictures_of_the_size_and_masks_black_or_white() {
        let ramp = RgbImage::from_fn(16, 8, |x, y| image::Rgb([(x * 16) as u8, (y * 32) as u8, 128]));
        let (bytes, size) = (file(&ramp), Size { width: 16, height: 8 });
        let (image, mask) = (File { field: "init_image", bytes: &bytes }, File { field: "mask", bytes: &bytes });
        let same = picture(image, Some(mask), size, 0.5).expect("is fine");
        assert_eq!(same.image, ramp);
        let mask = same.mask.expect("there is one");
        assert!(mask.pixels().all(|pixel| [0, 255].contains(&pixel.0[0])));
        assert_eq!((mask.get_pixel(0, 0).0[0], mask.get_pixel(15, 7).0[0]), (0, 255));
        let smaller = picture(image, None, Size { width: 8, height: 8 }, 0.5).expect("is fine");
        assert_eq!(smaller.image.dimensions(), (8, 8));
    }

    #[test]
    fn what_is_no_picture_is_refused_with_its_field() {
        let whole = file(&RgbImage::new(64, 64));
        let mut huge = whole.clone();
        // The width in a PNG's header, whose checksum then is wrong as well.
        huge[16..20].copy_from_slice(&0x7fff_ffffu32.to_be_bytes());
        for bytes in [&b""[..], b"GIF89a", &whole[..whole.len() / 2], &huge] {
            let size = Size { width: 64, height: 64 };
            let error = picture(File { field: "mask", bytes }, None, size, 1.0).expect_err("is refused");
            assert_eq!((error.code, error.field.as_str()), (ErrorCode::InvalidField, "mask"));
        }
    }
}
