//! In what work is counted, the same for those who do it and those who plan it.

use crate::v1::{GenerateRequest, Size};

/// Units of an image for a hand: denoising steps of a million pixels. See [`crate::v1::StageTime`].
pub fn image_units(size: &Size, steps: u32) -> f64 {
    f64::from(steps) * f64::from(size.width) * f64::from(size.height) / 1e6
}

/// Units of all images of a request that has every default filled in.
pub fn request_units(request: &GenerateRequest) -> f64 {
    image_units(&request.size.unwrap_or_default(), request.steps()) * f64::from(request.image_count())
}
