//! Pictures that begin with a picture, over the whole path: files that clients bring or put, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{io::Cursor, sync::Arc};

use efferent_hand::pictures;
use efferent_proto::v1::{
    GenerateRequest, JobEvent, PictureSource, PutObjectRequest, Size, job_event::Event,
    object_service_client::ObjectServiceClient, picture_source::Source,
};
use efferent_tests::{
    calls::{generate, kind, request},
    checkpoints::{PROMPTS, begun, embed, folder, open, steps_apart},
    processes::{Cluster, connect},
};
use efferent_worker::{engine::RenderRequest, pictures::File, signal::ControlSignal, testing};
use image::{ImageFormat, Rgb, RgbImage};

fn ramp(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, 90]))
}

/// White on the left.
fn half(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, _| Rgb([if x < width / 2 { 255 } else { 0 }; 3]))
}

fn png(picture: &RgbImage) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}

fn brought(picture: &RgbImage) -> Option<PictureSource> {
    Some(PictureSource { source: Some(Source::Data(png(picture).into())) })
}

fn put(hash: &str) -> Option<PictureSource> {
    Some(PictureSource { source: Some(Source::Hash(hash.to_owned())) })
}

fn picture(events: &[JobEvent]) -> RgbImage {
    let image = events.iter().find_map(|event| match &event.event {
        Some(Event::Image(image)) => Some(image.data.clone()),
        _ => None,
    });
    image::load_from_memory(&image.unwrap()).unwrap().to_rgb8()
}

/// What requests to a hand have in common here.
fn usual(signal: &Arc<ControlSignal>, size: Size, sampler: &str) -> RenderRequest {
    RenderRequest {
        signal: signal.clone(),
        size,
        steps: 4,
        guidance_scale: 4.0,
        image_guidance_scale: 1.0,
        guidance_rescale: 0.0,
        guidance_range: 0.0..1.0,
        seed: 1,
        sampler: sampler.to_owned(),
        picture: None,
    }
}

/// Steps that were told, and of how many.
fn steps(events: &[JobEvent]) -> Vec<(u32, u32)> {
    let step = |event: &JobEvent| match &event.event {
        Some(Event::Step(step)) => Some((step.step, step.steps)),
        _ => None,
    };
    events.iter().filter_map(step).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_is_begun_with_wherever_its_file_comes_from() {
    let model = folder("sd15");
    let cluster = Cluster::start(&[("EFFERENT_MODEL", model.to_str().unwrap())]);
    let (_brain, _hand) = (cluster.role("brain", &[]), cluster.role("hand", &[]));
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let (width, height) = (24, 16);
    let begun = |init_image, mask| GenerateRequest {
        init_image,
        mask,
        steps: Some(6),
        strength: Some(0.5),
        seed: Some(3),
        guidance_scale: Some(2.0),
        inline_images: true,
        ..request(PROMPTS[0])
    };
    let events = generate(&mut client, begun(brought(&ramp(width, height)), None)).await;
    assert_eq!(kind(events.last().unwrap()), "done", "{events:?}");
    // The picture's own size, as none was asked for; half of the steps.
    let first = picture(&events);
    assert_eq!(first.dimensions(), (width, height));
    assert_eq!(steps(&events).last(), Some(&(3, 3)));
    let Some(Event::Accepted(accepted)) = &events[0].event else { unreachable!("{events:?}") };
    let kept = accepted.request.as_ref().unwrap().init_image.clone().unwrap();
    let Some(Source::Hash(hash)) = kept.source else { unreachable!("the file is kept, not carried along") };

    let mut objects = ObjectServiceClient::connect(url.to_owned()).await.unwrap();
    let part = PutObjectRequest { data: png(&ramp(width, height)).into() };
    let stored = objects.put_object(tokio_stream::iter([part])).await.unwrap().into_inner();
    assert_eq!(stored.hash, hash);
    let again = generate(&mut client, begun(put(&hash), None)).await;
    assert!(picture(&again) == first, "the same request, told otherwise");

    // What the mask leaves alone stays nearly as the autoencoder has it, and the rest does not.
    let partly = generate(&mut client, begun(put(&hash), brought(&half(width, height)))).await;
    let partly = picture(&partly);
    let mut engines = open("sd15");
    let size = Size { width, height };
    let (image, mask) = (png(&ramp(width, height)), png(&half(width, height)));
    let (image, mask) = (File { field: "init_image", bytes: &image }, File { field: "mask", bytes: &mask });
    let signal = embed(&mut *engines.1, PROMPTS[0], "");
    let sampler = &engines.2.spec().model.samplers[0];
    let alone = RenderRequest {
        steps: 6,
        guidance_scale: 2.0,
        seed: 3,
        picture: Some(Arc::new(pictures::picture(image, Some(mask), size, 0.5).unwrap())),
        ..usual(&signal, size, sampler)
    };
    let mut sample = engines.2.begin(&alone).unwrap();
    while !sample.is_complete() {
        engines.2.step(&mut [&mut sample]).remove(0).unwrap();
    }
    let wanted: Vec<f32> = engines.2.finish(sample).unwrap().as_raw().iter().map(|byte| f32::from(*byte)).collect();
    assert!(steps_apart(&partly, &wanted) <= 1.0);
    assert!(partly != first);

    for (refused, field) in [
        (begun(put(&"0".repeat(64)), None), "init_image"),
        (begun(Some(PictureSource { source: Some(Source::Data("no picture".into())) }), None), "init_image"),
        (begun(put(&hash), put(&"1".repeat(64))), "mask"),
        (GenerateRequest { strength: Some(0.01), ..begun(put(&hash), None) }, "strength"),
    ] {
        let at_fault = match client.generate(refused.clone()).await {
            Err(status) => efferent_proto::ApiError::from(&status).field,
            Ok(stream) => {
                let events = efferent_tests::calls::all(stream.into_inner()).await;
                let Some(Event::Failed(failed)) = events.last().and_then(|event| event.event.clone()) else {
                    unreachable!("{refused:?} {events:?}")
                };
                failed.error.unwrap().field
            }
        };
        assert_eq!(at_fault, field);
    }
    // A file that is damaged further on than its beginning tells is found by the hand, which lives on.
    let whole = png(&ramp(64, 64));
    let cut = PictureSource { source: Some(Source::Data(whole[..whole.len() / 2].to_vec().into())) };
    let events = generate(&mut client, begun(Some(cut), None)).await;
    let Some(Event::Failed(failed)) = &events.last().unwrap().event else { unreachable!("{events:?}") };
    assert_eq!(failed.error.as_ref().unwrap().field, "init_image");
    assert!(picture(&generate(&mut client, begun(put(&hash), None)).await) == first);
}

#[test]
fn networks_made_for_inpainting_mend_as_in_diffusers() {
    for name in ["sd15-inpainting", "sdxl-inpainting"] {
        let (_, mut brain, mut hand) = open(name);
        let model = hand.spec().model.clone();
        assert!(model.inpainting_only && model.inpainting, "{name}");
        begun(name, &mut *brain, &mut *hand).unwrap();
        let files = [png(&ramp(24, 16)), png(&half(24, 16))];
        let [image, mask] =
            [("init_image", &files[0]), ("mask", &files[1])].map(|(field, bytes)| File { field, bytes });
        let size = Size { width: 24, height: 16 };
        let signal = embed(&mut *brain, "a cat", "");
        for sampler in &model.samplers {
            let usual = usual(&signal, size, sampler);
            let render = |seed, steps, strength, mask: Option<File<'_>>| RenderRequest {
                steps,
                seed,
                picture: Some(Arc::new(pictures::picture(image, mask, size, strength).unwrap())),
                ..usual.clone()
            };
            let samples = [render(1, 6, 0.7, Some(mask)), render(2, 5, 1.0, Some(mask))];
            testing::check_hand(&mut *hand, &samples);
            let without = RenderRequest { picture: None, ..samples[0].clone() };
            for wrong in [without, render(3, 4, 1.0, None)] {
                assert!(hand.begin(&wrong).unwrap_err().to_string().contains("init_image and mask"), "{name}");
            }
        }
    }
}

#[test]
fn samples_that_began_with_pictures_keep_the_contract() {
    for (name, size) in [("sd15", 16), ("sdxl", 16), ("flux-dev", 16), ("sana-sprint", 32)] {
        let (_, mut brain, mut hand) = open(name);
        let model = hand.spec().model.clone();
        let signal = embed(&mut *brain, "a cat", "");
        let files = [png(&ramp(size, size)), png(&half(size, size))];
        let [image, mask] =
            [("init_image", &files[0]), ("mask", &files[1])].map(|(field, bytes)| File { field, bytes });
        let size = Size { width: size, height: size };
        for sampler in &model.samplers {
            let usual = usual(&signal, size, sampler);
            let render = |seed, steps, strength, mask: Option<File<'_>>| RenderRequest {
                steps,
                seed,
                picture: Some(Arc::new(pictures::picture(image, mask, size, strength).unwrap())),
                ..usual.clone()
            };
            let mask = model.inpainting.then_some(mask);
            testing::check_hand(
                &mut *hand,
                &[render(1, 6, 0.7, None), render(2, 5, 1.0, mask), render(3, 8, 0.5, mask)],
            );
        }
    }
}
