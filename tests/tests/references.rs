//! Pictures that a brain reads before the prompt: the engines' contract, and the whole path. That they are read, and guide, as in MetaQuery is for `checkpoints.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{io::Cursor, sync::Arc};

use efferent_proto::{
    ApiError,
    v1::{
        EncodeRequest, ErrorCode, GenerateRequest, JobEvent, PictureSource, job_event::Event, picture_source::Source,
        signal_service_client::SignalServiceClient,
    },
};
use efferent_tests::{
    calls::{generate, kind, request},
    checkpoints::{PROMPTS, folder, open, read_with as read, references},
    processes::{Cluster, connect},
};
use efferent_worker::{
    engine::{EmbedRequest, RenderRequest},
    testing,
};
use image::{ImageFormat, RgbImage};

const NAMES: [&str; 2] = ["metaquery-qwen2-5-vl", "metaquery-qwen3-vl"];

#[test]
fn engines_keep_the_contract_with_pictures() {
    for name in NAMES {
        let (_, mut brain, mut hand) = open(name);
        let pictures = references(name);
        let requests = [
            read("a cat", "", &pictures),
            read("a cat", "a dog", &pictures[1..]),
            read("a cat", "", &[]),
            read("", "", &[RgbImage::new(1, 1)]),
            // Scaled up, and down.
            read("a cat", "", &[RgbImage::new(3, 400), RgbImage::new(301, 77)]),
        ];
        testing::check_brain(&mut *brain, &requests, &read("a cat", "", &[RgbImage::new(1, 201)]));
        let three = brain.embed(&[read("a cat", "", &vec![RgbImage::new(8, 8); 3])]).remove(0).unwrap_err();
        assert!(three.to_string().contains("this model reads 2"), "{three}");
        let mut render = |request: &EmbedRequest, steps, image_guidance_scale| RenderRequest {
            signal: Arc::new(brain.embed(std::slice::from_ref(request)).remove(0).unwrap()),
            size: hand.spec().model.sizes[0],
            steps,
            guidance_scale: 4.0,
            image_guidance_scale,
            guidance_rescale: 0.0,
            guidance_range: 0.0..0.7,
            seed: 1,
            sampler: "euler".to_owned(),
            picture: None,
        };
        // With three branches, with two, and without pictures.
        let renders = [render(&requests[0], 3, 1.5), render(&requests[1], 5, 1.0), render(&requests[2], 2, 1.5)];
        testing::check_hand(&mut *hand, &renders);
    }
}

fn file(picture: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, format).unwrap();
    file.into_inner()
}

fn brought(bytes: Vec<u8>) -> PictureSource {
    PictureSource { source: Some(Source::Data(bytes.into())) }
}

fn image(events: &[JobEvent]) -> Vec<u8> {
    let image = events.iter().find_map(|event| match &event.event {
        Some(Event::Image(image)) => Some(image.data.to_vec()),
        _ => None,
    });
    image.unwrap_or_else(|| panic!("no image: {events:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_go_to_the_brain_over_the_whole_path() {
    let model = folder(NAMES[0]);
    let cluster = Cluster::start(&[("EFFERENT_MODEL", model.to_str().unwrap())]);
    let (_brain, _hand) = (cluster.role("brain", &[]), cluster.role("hand", &[]));
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let pictures = references(NAMES[0]);
    let files: Vec<PictureSource> = pictures.iter().map(|picture| brought(file(picture, ImageFormat::Png))).collect();
    let asked = |reference_images: Vec<PictureSource>, image_guidance_scale| GenerateRequest {
        reference_images,
        image_guidance_scale,
        steps: Some(4),
        seed: Some(3),
        inline_images: true,
        ..request(PROMPTS[0])
    };
    let with_both = generate(&mut client, asked(files.clone(), None)).await;
    assert_eq!(kind(with_both.last().unwrap()), "done", "{with_both:?}");
    let Some(Event::Accepted(accepted)) = &with_both[0].event else { unreachable!("{with_both:?}") };
    let accepted = accepted.request.clone().unwrap();
    assert_eq!(accepted.image_guidance_scale, Some(1.5), "the model's own");
    // By their hashes, the same; in another order, with another strength, or without them, another picture.
    assert!(accepted.reference_images.iter().all(|source| matches!(source.source, Some(Source::Hash(_)))));
    let kept = accepted.reference_images;
    let both = image(&with_both);
    assert!(image(&generate(&mut client, asked(kept.clone(), Some(1.5))).await) == both);
    let swapped = kept.iter().rev().cloned().collect();
    for other in [asked(swapped, None), asked(kept.clone(), Some(2.5)), asked(kept.clone(), Some(1.0))] {
        assert!(image(&generate(&mut client, other).await) != both);
    }
    assert!(image(&generate(&mut client, asked(Vec::new(), None)).await) != both);

    // Kept as a signal, and rendered from it.
    let mut signals = SignalServiceClient::connect(url.to_owned()).await.unwrap();
    let encode =
        EncodeRequest { prompt: PROMPTS[0].to_owned(), reference_images: files.clone(), ..EncodeRequest::default() };
    let signal = signals.encode(encode).await.unwrap().into_inner();
    assert_eq!(signal.reference_images.len(), 2);
    let mut from_signal = asked(Vec::new(), None);
    (from_signal.signal_id, from_signal.prompt) = (signal.signal_id, String::new());
    assert!(image(&generate(&mut client, from_signal.clone()).await) == both);

    let damaged = file(&pictures[0], ImageFormat::Png);
    let cut = brought(damaged[..damaged.len() / 2].to_vec());
    let long = brought(file(&RgbImage::new(402, 1), ImageFormat::WebP));
    for (refused, code, field) in [
        (asked(vec![files[0].clone(); 3], None), ErrorCode::NotOffered, "reference_images"),
        (asked(vec![files[0].clone(); 9], None), ErrorCode::LimitExceeded, "reference_images"),
        (asked(vec![brought(b"GIF89a".to_vec())], None), ErrorCode::InvalidField, "reference_images"),
        (asked(vec![PictureSource::default()], None), ErrorCode::InvalidField, "reference_images"),
        (asked(Vec::new(), Some(2.0)), ErrorCode::InvalidField, "image_guidance_scale"),
        (asked(files.clone(), Some(f32::NAN)), ErrorCode::LimitExceeded, "image_guidance_scale"),
        (
            GenerateRequest { reference_images: files.clone(), ..from_signal },
            ErrorCode::InvalidField,
            "reference_images",
        ),
        // What its beginning does not tell is found by the brain, which lives on.
        (asked(vec![cut], None), ErrorCode::InvalidField, "reference_images"),
        (asked(vec![long], None), ErrorCode::InvalidField, "reference_images"),
    ] {
        let error = match client.generate(refused.clone()).await {
            Err(status) => ApiError::from(&status),
            Ok(stream) => {
                let events = efferent_tests::calls::all(stream.into_inner()).await;
                let Some(Event::Failed(failed)) = events.last().and_then(|event| event.event.clone()) else {
                    unreachable!("{refused:?} {events:?}")
                };
                ApiError::from(&failed.error.unwrap())
            }
        };
        assert_eq!((error.code, &*error.field), (code, field), "{error:?}");
    }
    assert!(image(&generate(&mut client, asked(kept, None)).await) == both);
}
