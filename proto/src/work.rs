//! In what work is counted and what bounds it, the same for those who do it and those who plan it.

use std::time::Duration;

use crate::v1::{GenerateRequest, Model, PictureSource, Size, SizeRange};

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

/// The files that a request brings or refers to, with their fields.
pub fn pictures(request: &GenerateRequest) -> impl Iterator<Item = (&'static str, &PictureSource)> {
    let single = [("init_image", &request.init_image), ("mask", &request.mask)];
    let single = single.into_iter().filter_map(|(field, source)| Some((field, source.as_ref()?)));
    single.chain(request.reference_images.iter().map(|source| ("reference_images", source)))
}

/// The same, to be changed.
pub fn pictures_mut(request: &mut GenerateRequest) -> impl Iterator<Item = &mut PictureSource> {
    [&mut request.init_image, &mut request.mask].into_iter().flatten().chain(&mut request.reference_images)
}

/// The share of the steps that are made of a request that begins with a picture and does not say.
pub const DEFAULT_STRENGTH: f32 = 0.8;

/// The share of a request's steps that are made, as it was typed: 0.3, not the nearest number of 32 bits, of which 50 steps would be a little more than 15.
pub fn strength(request: &GenerateRequest) -> f64 {
    if request.init_image.is_none() {
        return 1.0;
    }
    as_typed(request.strength.unwrap_or(DEFAULT_STRENGTH))
}

/// A number as it was typed: the shortest that 32 bits keep so.
pub fn as_typed(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}

/// About how many steps of a request that has every default filled in are made.
pub fn steps(request: &GenerateRequest) -> u32 {
    (f64::from(request.steps()) * strength(request)).ceil() as u32
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strength_is_as_it_was_typed() {
        for (steps, strength, made) in [(50, 0.3, 15), (10, 0.7, 7), (20, 0.6, 12), (3, 1.0, 3), (5, 0.5, 3)] {
            let (steps, strength) = (Some(steps), Some(strength));
            let request =
                GenerateRequest { steps, strength, init_image: Some(Default::default()), ..Default::default() };
            assert_eq!(super::steps(&request), made, "{steps:?} at {strength:?}");
        }
        let plain = GenerateRequest { steps: Some(20), ..Default::default() };
        assert_eq!(super::steps(&plain), 20);
    }
}
