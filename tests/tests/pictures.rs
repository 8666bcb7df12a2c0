//! Pictures over the whole path: those that begin with a picture (files that clients bring or put, and what is refused), and those of the shipped
//! pipeline while its workers are killed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::HashSet, io::Cursor, path::Path, sync::Arc, time::Duration};

use efferent_bus::ledger::{Ledger, Options};
use efferent_hand::pictures;
use efferent_proto::{
    names,
    v1::{
        BatchState, GenerateRequest, GetBatchRequest, GetImageRequest, JobEvent, ListModelsRequest, PictureSource,
        PutObjectRequest, Size, cluster_service_client::ClusterServiceClient, job_event::Event,
        object_service_client::ObjectServiceClient, picture_source::Source,
    },
};
use efferent_tests::{
    batches::{self, end, key, results, submit},
    calls::{PATIENCE, all, durable, generate, job, kind, request, watch},
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

/// How long a task is leased while workers are killed.
const LEASE: Duration = Duration::from_secs(2);

/// So many requests, each with a prompt and a seed of its own.
fn varied(count: usize) -> Vec<GenerateRequest> {
    const COLOURS: [&str; 5] = ["red", "blue", "green", "yellow", "white"];
    const THINGS: [&str; 6] = ["apple", "fish", "house", "cat", "tree", "car"];
    let prompt = |number: usize| format!("a {} {}", COLOURS[number % COLOURS.len()], THINGS[number % THINGS.len()]);
    (0..count).map(|n| GenerateRequest { seed: Some(n as u64), ..request(&prompt(n)) }).collect()
}

async fn reached(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let look = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_pipeline_draws_each_picture_once_and_the_same_whoever_is_killed() {
    const ITEMS: usize = 24;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/pictogram");
    let cluster = Cluster::start(&[
        ("EFFERENT_MODEL", model.to_str().unwrap()),
        ("EFFERENT_LEDGER__LEASE", "2s"),
        // So that the brain has read few when it is killed; and the one of the undisturbed run reads all anew.
        ("EFFERENT_BRAIN__MAX_PROMPTS", "2"),
        ("EFFERENT_BRAIN__SHARE", "0s"),
        ("EFFERENT_HAND__MAX_IMAGES", "2"),
        ("EFFERENT_HAND__CHECKPOINT_AFTER", "100ms"),
        ("EFFERENT_HAND__CHECKPOINT_INTERVAL", "50ms"),
    ]);
    let start = |role: &str| cluster.role(role, &[]).0;
    let (mut brain, mut hands) = (start("brain"), vec![start("hand"), start("hand")]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut batch_client = batches::Client::connect(url.clone()).await.unwrap();
    // The last six are sent alone, two before each death.
    let requests = varied(ITEMS + 6);
    let mut singles = requests[ITEMS..].chunks(2);
    let mut streams = Vec::new();
    let mut send_two = async || {
        for request in singles.next().unwrap() {
            let events = client.clone().generate(request.clone()).await.unwrap().into_inner();
            streams.push(tokio::spawn(all(events)));
        }
    };
    let batch_id = batches::id(&submit(&mut batch_client, key(""), &requests[..ITEMS]).await.unwrap());
    let batch = async || {
        let request = GetBatchRequest { batch_id: batch_id.clone() };
        batch_client.clone().get_batch(request).await.unwrap().into_inner()
    };
    send_two().await;
    reached("a prompt is read", async || brain.counter("efferent_brain_publish_seconds_count") > 0).await;
    assert!(batch().await.succeeded < ITEMS as u64 / 2, "it has only begun");
    brain.kill();
    brain = start("brain");
    for drawn in [6, 12] {
        reached("pictures are drawn", async || batch().await.succeeded >= drawn).await;
        send_two().await;
        assert_eq!(batch().await.state(), BatchState::Running, "it is in the middle");
        hands.remove(0).kill();
        hands.push(start("hand"));
    }
    let ended = end(&mut batch_client.clone(), &batch_id).await;
    let outcome = (ended.state(), ended.succeeded, ended.failed);
    assert_eq!(outcome, (BatchState::Ended, ITEMS as u64, 0), "{}", cluster.log());
    let items = results(&mut batch_client.clone(), &batch_id, 0, &[]).await;
    let mut jobs: Vec<String> = items.into_iter().map(|item| item.job_id).collect();
    for events in streams {
        jobs.push(events.await.unwrap()[0].job_id.clone());
    }
    assert_eq!(jobs.iter().collect::<HashSet<_>>().len(), requests.len(), "a job for each");
    let mut drawn = Vec::new();
    for id in &jobs {
        let told = durable(&all(watch(&mut client, id, 0).await).await, 0);
        assert_eq!(told.iter().filter(|kind| **kind == "image").count(), 1, "{told:?}");
        assert_eq!(told.last(), Some(&"done"));
        let mut images = job(&mut client, id).await.images;
        assert_eq!(images.len(), 1, "{images:?}");
        drawn.push(images.remove(0));
        let image = GetImageRequest { job_id: id.clone(), image_index: 0 };
        let mut chunks = client.get_image(image).await.unwrap().into_inner();
        let mut file = Vec::new();
        while let Some(chunk) = chunks.message().await.unwrap() {
            file.extend_from_slice(&chunk.data);
        }
        assert_eq!(blake3::hash(&file).to_hex().as_str(), drawn[drawn.len() - 1].hash);
    }
    // What the dead had in hand was done again.
    assert!(brain.counter("efferent_redeliveries_total") > 0, "the brain died with nothing in hand");
    assert!(drawn.iter().any(|image| image.attempt > 1), "hands died with nothing in hand");
    let hashes: Vec<_> = drawn.iter().map(|image| &image.hash).collect();
    assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), requests.len(), "each prompt has another picture");

    // Undisturbed, they are the same.
    assert!(brain.terminate(), "{}", cluster.log());
    let _brain = start("brain");
    let again = batches::id(&submit(&mut batch_client.clone(), key(""), &requests).await.unwrap());
    assert_eq!(end(&mut batch_client.clone(), &again).await.succeeded, requests.len() as u64);
    let undisturbed = results(&mut batch_client.clone(), &again, 0, &[]).await;
    assert!(undisturbed.iter().map(|item| &item.images[0].hash).eq(hashes), "{drawn:?}\n{undisturbed:?}");

    let ledger = Ledger::new(cluster.bus().await, Options { lease: LEASE, ..Options::default() });
    let mut cluster_client = ClusterServiceClient::connect(url).await.unwrap();
    let models = cluster_client.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    ledger.declare_queues(&models[0]).await.unwrap();
    let queues =
        names::LANES.map(|lane| [names::brain_queue(&models[0].brain, lane), names::hand_queue(&models[0].hand, lane)]);
    reached("nothing is left in queues", async || {
        let mut left = 0;
        for queue in queues.iter().flatten() {
            let depth = ledger.bus().depth(queue).await.unwrap();
            left += depth.ready + depth.leased;
        }
        left == 0
    })
    .await;
    assert!(ledger.letters().await.unwrap().is_empty(), "nothing was given up");
}
