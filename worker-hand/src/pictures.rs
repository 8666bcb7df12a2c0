//! Files that a request brings, to pictures of the size that is to be drawn.

use efferent_proto::{ApiError, v1::Size};
use efferent_worker::{
    engine::Picture,
    pictures::{File, decode},
};
use image::{
    GrayImage, RgbImage,
    imageops::{self, FilterType},
};

/// What to begin with.
///
/// # Errors
/// If a file is not a PNG, JPEG or WebP, is damaged, or too large.
pub fn picture(image: File<'_>, mask: Option<File<'_>>, size: Size, strength: f64) -> Result<Picture, ApiError> {
    let image = scaled(decode(image)?, size);
    let mask = mask.map(|file| Ok::<_, ApiError>(black_or_white(&scaled(decode(file)?, size)))).transpose()?;
    Ok(Picture { image, mask, strength })
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
    use std::io::Cursor;

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
}
