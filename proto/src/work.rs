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

/// Units of all images of a request that has every default filled in.
pub fn request_units(request: &GenerateRequest) -> f64 {
    image_units(&request.size.unwrap_or_default(), request.steps()) * f64::from(request.image_count())
}

/// The seed of an image of a request that has every default filled in.
pub fn image_seed(request: &GenerateRequest, image_index: u32) -> u64 {
    let given = request.seeds.get(image_index as usize).copied();
    given.unwrap_or_else(|| request.seed().wrapping_add(u64::from(image_index)))
}
