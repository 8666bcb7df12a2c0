//! What brains read besides a prompt: pictures before it, over the whole path too (that these are read, and guide, as in MetaQuery is for `checkpoints.rs`), and what the language model has written about it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{io::Cursor, path::Path, sync::Arc};

use candle_core::Device;
use efferent_brain::families as brains;

use efferent_proto::{
    ApiError,
    internal::{Branch, StreamRole},
    v1::{
        EncodeRequest, ErrorCode, GenerateRequest, JobEvent, PictureSource, job_event::Event, picture_source::Source,
        signal_service_client::SignalServiceClient,
    },
};
use efferent_tests::{
    calls::{generate, kind, request},
    checkpoints::{Golden, PROMPTS, TOLERANCE, device, difference, embed, folder, open, read_with as read, references},
    processes::{Cluster, connect},
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, RenderRequest},
    pipeline::Pipeline,
    signal, testing,
    weights::Dtypes,
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

/// A copy of a checkpoint whose language model writes before the queries are read.
fn thinking(name: &str, thinking: &serde_json::Value) -> (tempfile::TempDir, Result<Box<dyn Brain>, EngineError>) {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder(name)).unwrap().map(Result::unwrap) {
        std::os::unix::fs::symlink(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("pipeline.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest["brain"]["config"]["thinking"] = thinking.clone();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, manifest.to_string()).unwrap();
    let pipeline = Pipeline::open(copy.path()).unwrap();
    let brain = brains::factory(&pipeline, Path::new("/nowhere"), vec![device()], Dtypes::default())();
    (copy, brain)
}

#[test]
fn what_the_language_model_writes_is_read_with_the_prompt() {
    let after = "<|im_end|>\n<|im_start|>assistant\n";
    let config = |after: &str, until: &str, max_tokens: u32| serde_json::json!({ "after": after, "until": until, "max_tokens": max_tokens });
    let (_folder, brain) = thinking("metaquery", &config(after, "<|im_end|>", 6));
    let mut brain = brain.unwrap();
    let golden = Golden::read("metaquery", "thinking.safetensors");
    let plain = &mut *open("metaquery").1;
    let values = |brain: &mut dyn Brain, prompt: &str, branch| {
        let signal = embed(brain, prompt, "");
        let stream = signal::find(&signal, StreamRole::Query, branch).unwrap();
        signal::tensor(stream, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let states = values(&mut *brain, prompt, Branch::Conditional);
        let error = difference(&states, golden.values(&format!("{i}.states")));
        assert!(error <= TOLERANCE, "{prompt:?} differs by {error}");
        assert!(difference(&states, &values(plain, prompt, Branch::Conditional)) > 0.01, "something was written");
        // Nothing is written about what is to be kept out.
        assert!(values(&mut *brain, prompt, Branch::Unconditional) == values(plain, prompt, Branch::Unconditional));
    }
    let requests = [read(PROMPTS[0], "", &[]), read(PROMPTS[1], "a dog", &[]), read(PROMPTS[2], "", &[])];
    testing::check_brain(&mut *brain, &requests, &read(&"apple ".repeat(600), "", &[]));
    // Before pictures too.
    let (_folder, brain) = thinking(NAMES[1], &config(after, "<|im_end|>", 4));
    let pictured = [read("a cat", "", &references(NAMES[1])), read("a cat", "", &[])];
    testing::check_brain(&mut *brain.unwrap(), &pictured, &read(&"apple ".repeat(600), "", &[]));
    for (wrong, field) in [
        (config("<|im_end|>", "two tokens", 6), "brain.config.thinking.until"),
        (config("assistant", "<|im_end|>", 6), "brain.config.thinking"),
        (config(after, "<|im_end|>", 0), "brain.config.thinking"),
    ] {
        match thinking("metaquery", &wrong).1 {
            Err(EngineError::Refused(error)) => assert_eq!(error.field, field, "{error}"),
            other => unreachable!("{wrong}: {}", other.is_ok()),
        }
    }
    // A model that is not made for writing: what predicts tokens is missing.
    let (copy, _) = thinking("metaquery", &config(after, "<|im_end|>", 6));
    let language = copy.path().join("language_model");
    std::fs::remove_file(&language).unwrap();
    std::fs::create_dir(&language).unwrap();
    let from = folder("metaquery").join("language_model");
    std::fs::copy(from.join("config.json"), language.join("config.json")).unwrap();
    let mut tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    assert!(tensors.remove("lm_head.weight").is_some());
    candle_core::safetensors::save(&tensors, language.join("model.safetensors")).unwrap();
    let pipeline = Pipeline::open(copy.path()).unwrap();
    let Err(error) = brains::factory(&pipeline, Path::new("/nowhere"), vec![device()], Dtypes::default())() else {
        unreachable!()
    };
    assert!(format!("{error:?}").contains("lm_head.weight is missing"));
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
    let large = brought(file(&RgbImage::new(10_000, 5_001), ImageFormat::Png));
    let long = brought(file(&RgbImage::new(402, 1), ImageFormat::WebP));
    for (refused, code, field) in [
        (asked(vec![files[0].clone(); 3], None), ErrorCode::NotOffered, "reference_images"),
        (asked(vec![files[0].clone(); 9], None), ErrorCode::LimitExceeded, "reference_images"),
        (asked(vec![brought(b"GIF89a".to_vec())], None), ErrorCode::InvalidField, "reference_images"),
        (asked(vec![large], None), ErrorCode::LimitExceeded, "reference_images"),
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
