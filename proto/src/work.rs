//! In what work is counted and what bounds it, the same for those who do it and those who plan it.

use std::time::Duration;

use crate::v1::{GenerateRequest, Size};

/// The longest deadline of a request.
pub const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Units of an image for a hand: denoising steps of a million pixels. See [`crate::v1::StageTime`].
pub fn image_units(size: &Size, steps: u32) -> f64 {
    f64::from(steps) * f64::from(size.width) * f64::from(size.height) / 1e6
}

/// Units of all images of a request that has every default filled in.
pub fn request_units(request: &GenerateRequest) -> f64 {
    image_units(&request.size.unwrap_or_default(), request.steps()) * f64::from(request.image_count())
}

/// The seed of an image of a request that has every default filled in.
pub fn image_seed(request: &GenerateRequest, image_index: u32) -> u64 {
    let given = request.seeds.get(image_index as usize).copied();
    given.unwrap_or_else(|| request.seed().wrapping_add(u64::from(image_index)))
}
