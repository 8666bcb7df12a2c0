//! In what work is counted and what bounds it, the same for those who do it and those who plan it.

use std::time::Duration;

use crate::v1::{GenerateRequest, Model, Size, SizeRange};

/// The longest deadline of a request.
pub const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Whether a model offers pictures of a size, by its list or by its rule.
pub fn offers_size(model: &Model, size: Size) -> bool {
    let fits = |range: &SizeRange| {
        let SizeRange { multiple, min_side, max_side, max_pixels } = *range;
        let side = |side: u32| (min_side..=max_side).contains(&side) && multiple > 0 && side.is_multiple_of(multiple);
        side(size.width) && side(size.height) && u64::from(size.width) * u64::from(size.height) <= max_pixels
    };
    model.sizes.contains(&size) || model.size_range.as_ref().is_some_and(fits)
}

/// Units of an image for a hand: denoising steps of a million pixels. See [`crate::v1::StageTime`].
pub fn image_units(size: &Size, steps: u32) -> f64 {
    f64::from(steps) * f64::from(size.width) * f64::from(size.height) / 1e6
}

/// The share of the steps that are made of a request that begins with a picture and does not say.
pub const DEFAULT_STRENGTH: f32 = 0.8;

/// The share of a request's steps that are made.
pub fn strength(request: &GenerateRequest) -> f32 {
    if request.init_image.is_none() { 1.0 } else { request.strength.unwrap_or(DEFAULT_STRENGTH) }
}

/// About how many steps of a request that has every default filled in are made.
pub fn steps(request: &GenerateRequest) -> u32 {
    (request.steps() as f32 * strength(request)).ceil() as u32
}

/// Units of all images of a request that has every default filled in.
pub fn request_units(request: &GenerateRequest) -> f64 {
    image_units(&request.size.unwrap_or_default(), steps(request)) * f64::from(request.image_count())
}

/// The seed of an image of a request that has every default filled in.
pub fn image_seed(request: &GenerateRequest, image_index: u32) -> u64 {
    let given = request.seeds.get(image_index as usize).copied();
    given.unwrap_or_else(|| request.seed().wrapping_add(u64::from(image_index)))
}
