//! Whether a request can be done at all, and what it is with every default filled in.

use std::time::Duration;

use efferent_proto::{
    ApiError, names, time,
    v1::{
        EncodeRequest, ErrorCode, GenerateRequest, ImageFormat, Lane, Model, Size, SizeRange, picture_source::Source,
    },
    work::{self, MAX_DEADLINE, offers_size},
};

use crate::tenants;

/// Most bytes of a prompt.
pub const MAX_PROMPT_BYTES: usize = 4096;
/// Most bytes of an idempotency key.
pub const MAX_KEY_BYTES: usize = 128;
/// Most images of a request, whatever the model offers.
pub const MAX_IMAGES: u32 = 16;
/// Most bytes of the files that a request brings: a message has at most 4 MiB.
pub const MAX_PICTURE_BYTES: usize = 3 << 20;
/// Most pictures for a brain to read that a request brings or refers to.
pub const MAX_REFERENCES: usize = 8;
/// How long a control signal is kept whose caller does not say.
const DEFAULT_KEEP: Duration = Duration::from_secs(24 * 3600);
/// Most steps of a request, whatever the model offers.
pub const MAX_STEPS: u32 = 150;
/// Strongest guidance of a request, whatever the model offers.
pub const MAX_GUIDANCE: f32 = 30.0;

fn invalid(field: &str, message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidField, message).field(field)
}

fn over(field: &str, limit: impl Into<String>, message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::LimitExceeded, message).field(field).limit(limit)
}

fn not_offered(field: &str, offer: impl Into<String>, message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::NotOffered, message).field(field).limit(offer)
}

/// Checks what no model could take. The model is not known yet.
///
/// # Errors
/// The first field at fault.
pub fn syntax(request: &GenerateRequest) -> Result<(), ApiError> {
    if request.signal_id.is_empty() {
        if request.prompt.trim().is_empty() {
            return Err(invalid("prompt", "prompt is empty"));
        }
    } else if !names::is_signal_id(&request.signal_id) {
        return Err(invalid("signal_id", "signal_id is not the id of a control signal: 64 hexadecimal digits"));
    } else if !request.prompt.is_empty() {
        return Err(invalid("prompt", "prompt is given beside signal_id; the signal was made of another one already"));
    } else if !request.negative_prompt.is_empty() {
        return Err(invalid(
            "negative_prompt",
            "negative_prompt is given beside signal_id; it is in the signal already",
        ));
    }
    if !request.seeds.is_empty() {
        if request.seeds.len() > MAX_IMAGES as usize {
            let message = format!("{} seeds are given, over the limit of {MAX_IMAGES}", request.seeds.len());
            return Err(over("seeds", format!("1..={MAX_IMAGES}"), message));
        }
        if request.seed.is_some() {
            return Err(invalid("seed", "seed is given beside seeds; give one of the two"));
        }
        if request.image_count.is_some_and(|count| count as usize != request.seeds.len()) {
            return Err(invalid("image_count", "image_count differs from the number of seeds; leave it out"));
        }
    }
    for (field, text) in [("prompt", &request.prompt), ("negative_prompt", &request.negative_prompt)] {
        if text.len() > MAX_PROMPT_BYTES {
            let message = format!("{field} has {} bytes, over the limit of {MAX_PROMPT_BYTES}", text.len());
            return Err(over(field, format!("1..={MAX_PROMPT_BYTES} bytes"), message));
        }
    }
    if let Some(scale) = request.guidance_scale
        && (!scale.is_finite() || scale < 0.0)
    {
        return Err(invalid("guidance_scale", format!("guidance_scale is {scale}; it must be a number from 0 up")));
    }
    if let Some(share) = request.guidance_rescale
        && !(0.0..=1.0).contains(&share)
    {
        return Err(over("guidance_rescale", "0..=1", format!("guidance_rescale is {share}; it must be 0 to 1")));
    }
    let (start, stop) = (request.guidance_start.unwrap_or(0.0), request.guidance_stop.unwrap_or(1.0));
    for (field, part) in [("guidance_start", start), ("guidance_stop", stop)] {
        if !(0.0..=1.0).contains(&part) {
            return Err(over(field, "0..=1", format!("{field} is {part}; it must be 0 to 1")));
        }
    }
    if start > stop {
        let message = format!("guidance_start is {start}, after guidance_stop, {stop}");
        return Err(over("guidance_start", format!("0..={stop}"), message));
    }
    pictures(request)?;
    if ImageFormat::try_from(request.format).is_err() {
        return Err(invalid(
            "format",
            format!("format {} is unknown; known are png (1), jpeg (2), webp (3)", request.format),
        ));
    }
    if Lane::try_from(request.lane).is_err() {
        return Err(invalid("lane", format!("lane {} is unknown; known are interactive (1), batch (2)", request.lane)));
    }
    tenants::named(&request.tenant)?;
    if request.idempotency_key.len() > MAX_KEY_BYTES {
        let message =
            format!("idempotency_key has {} bytes, over the limit of {MAX_KEY_BYTES}", request.idempotency_key.len());
        return Err(over("idempotency_key", format!("0..={MAX_KEY_BYTES} bytes"), message));
    }
    if let Some(deadline) = &request.deadline {
        match time::duration(deadline) {
            Some(deadline) if !deadline.is_zero() && deadline <= MAX_DEADLINE => {}
            _ => {
                let message = "deadline must be above 0 and at most 24 h";
                return Err(over("deadline", "0s..=86400s", message));
            }
        }
    }
    Ok(())
}

/// Checks what a request says of pictures to begin with.
fn pictures(request: &GenerateRequest) -> Result<(), ApiError> {
    if request.reference_images.len() > MAX_REFERENCES {
        let count = request.reference_images.len();
        let message = format!("{count} reference_images are given, over the limit of {MAX_REFERENCES}");
        return Err(over("reference_images", format!("0..={MAX_REFERENCES}"), message));
    }
    if !request.signal_id.is_empty() && !request.reference_images.is_empty() {
        let message = "reference_images are given beside signal_id; what was read is in the signal already";
        return Err(invalid("reference_images", message));
    }
    if let Some(scale) = request.image_guidance_scale {
        if !(0.0..=MAX_GUIDANCE).contains(&scale) {
            let message = format!("image_guidance_scale is {scale}; it must be 0 to {MAX_GUIDANCE}");
            return Err(over("image_guidance_scale", format!("0..={MAX_GUIDANCE}"), message));
        }
        if request.signal_id.is_empty() && request.reference_images.is_empty() {
            let message = "image_guidance_scale is given without reference_images, which it weighs";
            return Err(invalid("image_guidance_scale", message));
        }
    }
    let mut brought = 0;
    for (field, source) in work::pictures(request) {
        match &source.source {
            Some(Source::Data(bytes)) if !bytes.is_empty() => brought += bytes.len(),
            Some(Source::Hash(hash)) if names::is_hash(hash) => {}
            Some(Source::Hash(_)) => {
                return Err(invalid(field, format!("{field} is not the hash of a file: 64 hexadecimal digits")));
            }
            _ => return Err(invalid(field, format!("{field} has no file"))),
        }
        if brought > MAX_PICTURE_BYTES {
            let message = format!(
                "{field} brings {brought} bytes, over the limit of {MAX_PICTURE_BYTES}; put larger files with ObjectService and give their hash"
            );
            return Err(over(field, format!("1..={MAX_PICTURE_BYTES} bytes"), message));
        }
    }
    if request.init_image.is_none() {
        if request.mask.is_some() {
            return Err(invalid("mask", "mask is given without init_image, whose part it is to tell"));
        }
        if request.strength.is_some() {
            return Err(invalid("strength", "strength is given without init_image, which it is to change"));
        }
    }
    match request.strength {
        Some(strength) if !(strength > 0.0 && strength <= 1.0) => {
            Err(over("strength", "0..=1", format!("strength is {strength}; it must be above 0 and at most 1")))
        }
        _ => Ok(()),
    }
}

/// The request with every default filled in, if the model offers what it asks for.
///
/// # Errors
/// The first field at fault, with the limit or offer.
pub fn resolve(
    request: GenerateRequest,
    model: &Model,
    default_deadline: Duration,
) -> Result<GenerateRequest, ApiError> {
    let name = &model.name;
    if !request.negative_prompt.is_empty() && !model.negative_prompt {
        return Err(not_offered("negative_prompt", "none", format!("model {name} takes no negative prompt")));
    }
    if request.guidance_rescale() > 0.0 && !model.guidance_rescale {
        return Err(not_offered("guidance_rescale", "0", format!("model {name} does not rescale guidance")));
    }
    let field = match (request.guidance_start, request.guidance_stop) {
        (Some(start), _) if start > 0.0 => Some("guidance_start"),
        (_, Some(stop)) if stop < 1.0 => Some("guidance_stop"),
        _ => None,
    };
    if let Some(field) = field.filter(|_| !model.guidance_range) {
        let whole = if field == "guidance_start" { "0" } else { "1" };
        return Err(not_offered(field, whole, format!("model {name} guides all steps or none")));
    }
    if request.init_image.is_some() && !model.image_to_image {
        return Err(not_offered("init_image", "none", format!("model {name} does not begin with pictures")));
    }
    if request.mask.is_some() && !model.inpainting {
        return Err(not_offered("mask", "none", format!("model {name} does not change parts of pictures")));
    }
    let (references, most) = (request.reference_images.len(), model.max_reference_images);
    if references > most as usize {
        let message = match most {
            0 => format!("model {name} reads no pictures"),
            most => format!("{references} reference_images are given; model {name} reads up to {most}"),
        };
        return Err(not_offered("reference_images", most.to_string(), message));
    }
    if request.image_guidance_scale.is_some() && most == 0 {
        return Err(not_offered("image_guidance_scale", "none", format!("model {name} reads no pictures")));
    }
    let size = match request.size {
        None => model
            .sizes
            .first()
            .copied()
            .ok_or_else(|| not_offered("size", "", format!("model {name} offers no size")))?,
        Some(size) if offers_size(model, size) => size,
        Some(size) => {
            let sizes = model.sizes.iter().map(size_name).collect::<Vec<_>>().join(", ");
            let offer = sizes + &model.size_range.map(|range| range_name(&range)).unwrap_or_default();
            let message = format!("model {name} does not offer size {}; it offers {offer}", size_name(&size));
            return Err(not_offered("size", offer, message));
        }
    };
    let within = |field: &str, value: u32, most: u32| match value {
        value if (1..=most).contains(&value) => Ok(value),
        value => Err(over(field, format!("1..={most}"), format!("{field} is {value}; model {name} takes 1 to {most}"))),
    };
    let steps = within("steps", request.steps.unwrap_or(model.default_steps), model.max_steps.min(MAX_STEPS))?;
    let seeds = request.seeds.len() as u32;
    let (field, images) = match seeds {
        0 => ("image_count", request.image_count.unwrap_or(1)),
        seeds => ("seeds", seeds),
    };
    let images = within(field, images, model.max_image_count.min(MAX_IMAGES))?;
    let guidance_scale = request.guidance_scale.unwrap_or(model.default_guidance_scale);
    let strongest = model.max_guidance_scale.min(MAX_GUIDANCE);
    if guidance_scale > strongest {
        let message = format!("guidance_scale is {guidance_scale}; model {name} takes 0 to {strongest}");
        return Err(over("guidance_scale", format!("0..={strongest}"), message));
    }
    let sampler = match request.sampler.as_str() {
        "" => model.samplers.first().cloned().unwrap_or_default(),
        given if model.samplers.iter().any(|offered| offered == given) => given.to_owned(),
        given => {
            let offer = model.samplers.join(", ");
            let message = format!("model {name} does not offer sampler {given:?}; it offers {offer}");
            return Err(not_offered("sampler", offer, message));
        }
    };
    let mut resolved = GenerateRequest {
        model: name.clone(),
        size: Some(size),
        steps: Some(steps),
        image_count: Some(images),
        guidance_scale: Some(guidance_scale),
        // Generators of noise take 32 bits of a seed: a random one with more would pretend to more pictures than there are.
        seed: Some(
            request
                .seeds
                .first()
                .copied()
                .or(request.seed)
                .unwrap_or_else(|| ulid::Ulid::new().random() as u64 & 0xffff_ffff),
        ),
        deadline: Some(request.deadline.unwrap_or_else(|| time::proto_duration(default_deadline))),
        image_guidance_scale: (most > 0)
            .then(|| request.image_guidance_scale.unwrap_or(model.default_image_guidance_scale)),
        strength: request.init_image.as_ref().map(|_| request.strength.unwrap_or(work::DEFAULT_STRENGTH)),
        sampler,
        tenant: tenants::named(&request.tenant)?.to_owned(),
        ..request
    };
    if resolved.format() == ImageFormat::Unspecified {
        resolved.set_format(ImageFormat::Png);
    }
    if resolved.lane() == Lane::Unspecified {
        resolved.set_lane(Lane::Interactive);
    }
    Ok(resolved)
}

/// Refuses a request for pictures that brings none to a model that draws parts of pictures. (A control signal of it can be had without.)
///
/// # Errors
/// If so.
pub fn mended(request: &GenerateRequest, model: &Model) -> Result<(), ApiError> {
    let field = match (&request.init_image, &request.mask) {
        (None, _) => "init_image",
        (_, None) => "mask",
        _ => return Ok(()),
    };
    match model.inpainting_only {
        true => {
            let message = format!("model {} draws parts of pictures: it wants init_image and mask", model.name);
            Err(not_offered(field, "", message))
        }
        false => Ok(()),
    }
}

/// The request for a control signal, as one for pictures: with what no model could take refused.
///
/// # Errors
/// The first field at fault.
pub fn encoding(request: EncodeRequest, retention: Duration) -> Result<(GenerateRequest, Duration), ApiError> {
    let keep = match &request.time_to_live {
        None => DEFAULT_KEEP.min(retention),
        Some(keep) => match time::duration(keep) {
            Some(keep) if keep >= Duration::from_millis(1) && keep <= retention => keep,
            _ => {
                let limit = format!("0s..={}s", retention.as_secs());
                let message = format!("time_to_live must be above 0 and at most {} s", retention.as_secs());
                return Err(over("time_to_live", limit, message));
            }
        },
    };
    let EncodeRequest { prompt, negative_prompt, model, time_to_live: _, deadline, lane, tenant, reference_images } =
        request;
    let request = GenerateRequest {
        prompt,
        negative_prompt,
        model,
        deadline,
        lane,
        tenant,
        reference_images,
        ..GenerateRequest::default()
    };
    syntax(&request)?;
    Ok((request, keep))
}

fn range_name(range: &SizeRange) -> String {
    let SizeRange { multiple, min_side, max_side, max_pixels } = range;
    format!(" and sides of {min_side} to {max_side} in steps of {multiple} with at most {max_pixels} pixels")
}

fn size_name(size: &Size) -> String {
    format!("{}x{}", size.width, size.height)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use efferent_proto::v1::PictureSource;

    use super::*;

    fn model() -> Model {
        Model {
            name: "m".to_owned(),
            sizes: vec![Size { width: 96, height: 96 }],
            samplers: vec!["euler".to_owned(), "heun".to_owned()],
            default_steps: 12,
            max_steps: 100,
            default_guidance_scale: 2.5,
            max_guidance_scale: 10.0,
            max_image_count: 16,
            ..Default::default()
        }
    }

    fn source(bytes: &[u8]) -> Option<PictureSource> {
        Some(PictureSource { source: Some(Source::Data(Bytes::copy_from_slice(bytes))) })
    }

    fn hash(text: &str) -> Option<PictureSource> {
        Some(PictureSource { source: Some(Source::Hash(text.to_owned())) })
    }

    fn check(change: impl FnOnce(&mut GenerateRequest)) -> Result<GenerateRequest, (ErrorCode, String, String)> {
        let mut request = GenerateRequest { prompt: "a cat".to_owned(), ..Default::default() };
        change(&mut request);
        syntax(&request)
            .and_then(|()| resolve(request, &model(), Duration::from_secs(60)))
            .map_err(|error| (error.code, error.field, error.limit))
    }

    #[test]
    fn what_only_mends_wants_a_picture_and_a_mask() {
        let mends = Model { inpainting_only: true, ..model() };
        let bare = GenerateRequest::default();
        let begun = GenerateRequest { init_image: source(b"1"), ..bare.clone() };
        let whole = GenerateRequest { mask: source(b"2"), ..begun.clone() };
        for (request, field) in [(&bare, "init_image"), (&begun, "mask")] {
            let error = mended(request, &mends).expect_err("is refused");
            assert_eq!((error.code, error.field.as_str()), (ErrorCode::NotOffered, field));
            assert!(mended(request, &model()).is_ok());
        }
        assert!(mended(&whole, &mends).is_ok());
    }

    #[test]
    fn defaults_are_filled_in() {
        let request = check(|_| {}).expect("is fine");
        assert_eq!((request.steps, request.image_count, request.guidance_scale), (Some(12), Some(1), Some(2.5)));
        assert_eq!(
            (request.sampler.as_str(), request.format(), request.lane()),
            ("euler", ImageFormat::Png, Lane::Interactive)
        );
        assert!(request.seed.is_some() && request.size.is_some() && request.deadline.is_some());
        let seeds = check(|r| r.seeds = vec![7, 3]).expect("is fine");
        assert_eq!((seeds.image_count, seeds.seed), (Some(2), Some(7)));
    }

    #[test]
    fn sizes_may_be_offered_by_rule() {
        let range = SizeRange { multiple: 8, min_side: 64, max_side: 2048, max_pixels: 1 << 20 };
        let model = Model { size_range: Some(range), ..model() };
        let sized = |width, height| {
            let size = Some(Size { width, height });
            let request = GenerateRequest { prompt: "a cat".to_owned(), size, ..Default::default() };
            resolve(request, &model, Duration::from_secs(60)).map_err(|error| error.message)
        };
        for (width, height) in [(96, 96), (64, 2048), (1024, 1024), (72, 200)] {
            assert!(sized(width, height).is_ok(), "{width}x{height}");
        }
        for (width, height) in [(0, 0), (100, 64), (56, 64), (2056, 64), (1024, 1032), (u32::MAX, u32::MAX)] {
            let message = sized(width, height).unwrap_err();
            assert!(message.contains("96x96 and sides of 64 to 2048 in steps of 8"), "{message}");
        }
    }

    #[test]
    fn what_cannot_be_done_names_the_field_and_the_limit() {
        use ErrorCode::{InvalidField, LimitExceeded, NotOffered};
        type Change = Box<dyn FnOnce(&mut GenerateRequest)>;
        let cases: Vec<(Change, ErrorCode, &str, &str)> = vec![
            (Box::new(|r| r.prompt = " \n".to_owned()), InvalidField, "prompt", ""),
            (Box::new(|r| r.prompt = "x".repeat(4097)), LimitExceeded, "prompt", "1..=4096 bytes"),
            (Box::new(|r| r.negative_prompt = "x".to_owned()), NotOffered, "negative_prompt", "none"),
            (Box::new(|r| r.steps = Some(0)), LimitExceeded, "steps", "1..=100"),
            (Box::new(|r| r.steps = Some(10_000)), LimitExceeded, "steps", "1..=100"),
            (Box::new(|r| r.image_count = Some(0)), LimitExceeded, "image_count", "1..=16"),
            (Box::new(|r| r.image_count = Some(17)), LimitExceeded, "image_count", "1..=16"),
            (Box::new(|r| r.size = Some(Size { width: 512, height: 512 })), NotOffered, "size", "96x96"),
            (Box::new(|r| r.size = Some(Size { width: 0, height: 96 })), NotOffered, "size", "96x96"),
            (Box::new(|r| r.guidance_scale = Some(f32::NAN)), InvalidField, "guidance_scale", ""),
            (Box::new(|r| r.guidance_scale = Some(-1.0)), InvalidField, "guidance_scale", ""),
            (Box::new(|r| r.guidance_scale = Some(11.0)), LimitExceeded, "guidance_scale", "0..=10"),
            (Box::new(|r| r.sampler = "ddim".to_owned()), NotOffered, "sampler", "euler, heun"),
            (Box::new(|r| r.format = 9), InvalidField, "format", ""),
            (Box::new(|r| r.guidance_rescale = Some(1.5)), LimitExceeded, "guidance_rescale", "0..=1"),
            (Box::new(|r| r.guidance_rescale = Some(f32::NAN)), LimitExceeded, "guidance_rescale", "0..=1"),
            (Box::new(|r| r.guidance_rescale = Some(0.5)), NotOffered, "guidance_rescale", "0"),
            (Box::new(|r| r.guidance_start = Some(-0.1)), LimitExceeded, "guidance_start", "0..=1"),
            (Box::new(|r| r.guidance_stop = Some(f32::NAN)), LimitExceeded, "guidance_stop", "0..=1"),
            (
                Box::new(|r| (r.guidance_start, r.guidance_stop) = (Some(0.5), Some(0.25))),
                LimitExceeded,
                "guidance_start",
                "0..=0.25",
            ),
            (Box::new(|r| r.guidance_start = Some(0.5)), NotOffered, "guidance_start", "0"),
            (Box::new(|r| r.guidance_stop = Some(0.5)), NotOffered, "guidance_stop", "1"),
            (Box::new(|r| r.init_image = source(b"")), InvalidField, "init_image", ""),
            (Box::new(|r| r.init_image = source(b"png")), NotOffered, "init_image", "none"),
            (Box::new(|r| r.init_image = Some(PictureSource::default())), InvalidField, "init_image", ""),
            (
                Box::new(|r| r.init_image = source(&[0; (3 << 20) + 1])),
                LimitExceeded,
                "init_image",
                "1..=3145728 bytes",
            ),
            (Box::new(|r| r.init_image = hash("abc")), InvalidField, "init_image", ""),
            (Box::new(|r| r.mask = source(b"png")), InvalidField, "mask", ""),
            (Box::new(|r| r.strength = Some(0.5)), InvalidField, "strength", ""),
            (Box::new(|r| (r.init_image, r.strength) = (source(b"x"), Some(0.0))), LimitExceeded, "strength", "0..=1"),
            (Box::new(|r| (r.init_image, r.strength) = (source(b"x"), Some(1.1))), LimitExceeded, "strength", "0..=1"),
            (
                Box::new(|r| (r.init_image, r.strength) = (source(b"x"), Some(f32::NAN))),
                LimitExceeded,
                "strength",
                "0..=1",
            ),
            (Box::new(|r| r.lane = 9), InvalidField, "lane", ""),
            (Box::new(|r| r.tenant = "Studio 1".to_owned()), InvalidField, "tenant", ""),
            (Box::new(|r| r.signal_id = "a".repeat(64)), InvalidField, "prompt", ""),
            (Box::new(|r| r.signal_id = "a".repeat(63)), InvalidField, "signal_id", ""),
            (Box::new(|r| r.seeds = vec![1; 17]), LimitExceeded, "seeds", "1..=16"),
            (Box::new(|r| (r.seeds, r.seed) = (vec![1], Some(1))), InvalidField, "seed", ""),
            (Box::new(|r| (r.seeds, r.image_count) = (vec![1], Some(2))), InvalidField, "image_count", ""),
            (Box::new(|r| r.idempotency_key = "x".repeat(129)), LimitExceeded, "idempotency_key", "0..=128 bytes"),
            (
                Box::new(|r| r.deadline = Some(time::proto_duration(Duration::ZERO))),
                LimitExceeded,
                "deadline",
                "0s..=86400s",
            ),
        ];
        for (change, code, field, limit) in cases {
            assert_eq!(check(change), Err((code, field.to_owned(), limit.to_owned())));
        }
    }
}
