//! Pipelines of diffusers from tokens to pictures, against what diffusers computed with the same files: `tests/checkpoints`.
//!
//! `EFFERENT_PARITY=docs/parity.md cargo nextest run --release -p efferent-tests --test checkpoints` writes the measured errors into that file.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fmt::Write as _, path::Path, sync::Arc};

use candle_core::Device;
use efferent_brain::families::{
    self as brains,
    text_encoders::encoder::{Encoder, Use},
};
use efferent_hand::families as hands;
use efferent_proto::{
    internal::{Branch, StreamRole},
    v1::{CancelJobRequest, GenerateRequest, JobEvent, JobState, Size, job_event::Event},
};
use efferent_tests::{
    calls::{all, generate, job, kind, request, until},
    checkpoints::{
        Errors, Golden, NEGATIVE, PROMPTS, TOLERANCE, begun, compare, copied, damaged, device, difference, embed,
        folder, open, open_on_two, referenced, steps_apart, to_gguf,
    },
    local::Cluster,
    processes::{self, connect},
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, Hand, RenderRequest},
    pipeline::Pipeline,
    signal::{self, CONDITIONAL},
    testing,
    weights::Dtypes,
};

/// Every checkpoint, with the guidance that its pipeline has by default.
const CHECKPOINTS: [(&str, f32); 21] = [
    ("sd15", 7.5),
    ("sd21", 7.5),
    ("sdxl-zeros", 5.0),
    ("sdxl", 5.0),
    ("flux-dev", 3.5),
    // Takes none, whatever is asked for.
    ("flux-schnell", 0.0),
    ("flux-odd", 3.5),
    ("sd3", 7.0),
    ("sd35", 7.0),
    ("sd3-without-t5", 7.0),
    ("z-image", 5.0),
    ("z-image-turbo", 5.0),
    ("z-image-odd", 5.0),
    ("sana", 4.5),
    ("sana-odd", 4.5),
    ("sana-sprint", 4.5),
    ("metaquery", 4.5),
    ("openuni", 4.5),
    ("openuni-sd", 7.5),
    ("metaquery-qwen2-5-vl", 4.5),
    ("metaquery-qwen3-vl", 7.5),
];
/// Beginnings of their names, and the families that run the brain and the hand; the first that fits counts.
const FAMILIES: [(&str, &str, &str); 9] = [
    ("sd3", "text_encoders", "stable_diffusion_3"),
    ("sd", "text_encoders", "stable_diffusion"),
    ("flux", "text_encoders", "flux"),
    ("z-image", "text_encoders", "z_image"),
    ("sana", "text_encoders", "sana"),
    ("metaquery-qwen3-vl", "metaquery", "stable_diffusion"),
    ("metaquery", "metaquery", "sana"),
    ("openuni-sd", "metaquery", "stable_diffusion"),
    ("openuni", "metaquery", "sana"),
];
/// Longer than CLIP reads, for pipelines in which another encoder reads the whole.
fn long() -> String {
    ["a red apple and two cats jumps over the lazy dog"; 4].join(" ")
}

fn parity(name: &str, guidance_scale: f32) -> Errors {
    let (pipeline, mut brain, mut hand) = open(name);
    let golden = Golden::open(name);
    let mut errors = Errors::default();
    let long = long();
    let texts = || {
        let known = |(i, _): &(usize, &str)| golden.has(&format!("{i}.states"));
        PROMPTS.into_iter().chain([NEGATIVE, &*long]).enumerate().filter(known)
    };
    let configs = pipeline.brain().config["encoders"].as_array().cloned().unwrap_or_default();
    for (number, config) in configs.iter().enumerate() {
        let config = serde_json::from_value(config.clone()).unwrap();
        let encoder = Encoder::load(pipeline.folder(), &config, &[device()], &Dtypes::default()).unwrap();
        for (i, prompt) in texts() {
            let ids: Vec<f32> = encoder.ids(prompt, Use::Prompt).unwrap().into_iter().map(|id| id as f32).collect();
            assert_eq!(ids, golden.values(&format!("{i}.ids.{number}")), "{name}: ids of {prompt:?}");
        }
    }
    let negatives = brain.spec().model.negative_prompt;
    let check = |error: &mut f32, got: &[f32], key: &str| {
        let found = difference(got, golden.values(key));
        assert!(found <= TOLERANCE, "{name}: {key} differs by {found}");
        *error = error.max(found);
    };
    for (i, prompt) in texts() {
        let signal = embed(&mut *brain, prompt, "");
        let branches = [(Branch::Conditional, "states"), (Branch::Unconditional, "negative")];
        for (branch, key) in branches.into_iter().take(1 + usize::from(negatives)) {
            let roles = [StreamRole::Text, StreamRole::Query];
            let Some(stream) = roles.into_iter().find_map(|role| signal::find(&signal, role, branch)) else {
                assert!(branch == Branch::Unconditional && golden.values("0.negative").iter().all(|v| *v == 0.0));
                continue;
            };
            let states = signal::tensor(stream, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            check(&mut errors.states, &states, &format!("{i}.{key}"));
        }
        if let Some(pooled) = signal.pooled.iter().find(|vector| vector.label == CONDITIONAL) {
            check(&mut errors.pooled, &pooled.values, &format!("{i}.pooled"));
        }
    }
    let sampler = brain.spec().model.samplers[0].clone();
    let request = |brain: &mut dyn Brain, prompt: &str, negative: &str, seed, size| RenderRequest {
        signal: embed(brain, prompt, negative),
        size,
        steps: 4,
        guidance_scale,
        seed,
        sampler: sampler.clone(),
        image_guidance_scale: 1.0,
        guidance_rescale: 0.0,
        guidance_range: 0.0..1.0,
        picture: None,
    };
    let usual = golden.size("0.guided.image");
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let request = request(&mut *brain, prompt, "", 20 + i as u64, usual);
        compare(&mut *hand, &golden, &format!("{i}.guided"), &request, &mut errors);
    }
    if negatives {
        let negative = RenderRequest { guidance_scale: 3.5, ..request(&mut *brain, PROMPTS[0], NEGATIVE, 30, usual) };
        compare(&mut *hand, &golden, "negative", &negative, &mut errors);
    }
    // Where the strength counts from 0, 0 is none.
    let none = if name.starts_with("z-image") { 0.0 } else { 1.0 };
    let unguided = RenderRequest { guidance_scale: none, ..request(&mut *brain, PROMPTS[1], "", 31, usual) };
    compare(&mut *hand, &golden, "unguided", &unguided, &mut errors);
    let sized = request(&mut *brain, PROMPTS[1], "", 32, golden.size("sized.image"));
    compare(&mut *hand, &golden, "sized", &sized, &mut errors);
    let one = RenderRequest { steps: 1, ..request(&mut *brain, PROMPTS[0], "", 33, usual) };
    compare(&mut *hand, &golden, "one", &one, &mut errors);
    if golden.has("two.latents") {
        let two = RenderRequest { steps: 2, ..request(&mut *brain, PROMPTS[0], "", 34, usual) };
        compare(&mut *hand, &golden, "two", &two, &mut errors);
    }

    // What diffusers gives three prompts in one batch; here they share steps with others that came before and after.
    let mut batch: Vec<_> = PROMPTS
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| hand.begin(&request(&mut *brain, prompt, "", 20 + i as u64, usual)).unwrap())
        .collect();
    hand.step(&mut [&mut batch[1]]).remove(0).unwrap();
    while batch.iter().any(|sample| !sample.is_complete()) {
        let mut together: Vec<_> = batch.iter_mut().filter(|sample| !sample.is_complete()).collect();
        // Texts of another number of tokens may need a pass of their own.
        let key = together[0].key.clone();
        together.retain(|sample| sample.key == key);
        hand.step(&mut together).into_iter().for_each(|outcome| outcome.unwrap());
    }
    for (i, sample) in batch.into_iter().enumerate() {
        let apart = steps_apart(&hand.finish(sample).unwrap(), golden.values(&format!("batch.{i}.image")));
        assert!(apart <= 1.0, "{name}: picture {i} of the batch differs by {apart}/255");
        errors.image = errors.image.max(apart);
    }
    errors
}

#[test]
fn pictures_are_those_of_diffusers() {
    let mut table = String::from(
        "# Parity\n\nLargest differences from diffusers 0.42.1 (torch 2.15, f32, CPU) on tiny random checkpoints that `tests/checkpoints/*.py` made in the folder layout \
         that diffusers saves: three prompts alone and in a batch, a negative prompt, no guidance, another size, one step and four; begun with a picture: image to image and inpainting, with strengths of 0.5 and 1 of five steps (sd15 also with five samplers beside its own; Stable Diffusion 1.5 to XL with guidance rescaled as well); with one and two reference images, guided by them or not, against the published formula. Token ids are equal. Joints \
         are relative to the largest value of the joint, or to 1; pictures are 8-bit steps. Allowed: 1e-4, and 1 step.\n\nWritten by\n\n    \
         EFFERENT_PARITY=docs/parity.md cargo nextest run --release -p efferent-tests --test checkpoints\n\n| checkpoint | pipeline | states | pooled | every latent | picture | every latent, begun with a picture | its picture | states, with reference images | every latent, guided by them |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (name, guidance) in CHECKPOINTS {
        let Errors { states, pooled, latents, image } = parity(name, guidance);
        let (_, mut brain, mut hand) = open(name);
        let begun = begun(name, &mut *brain, &mut *hand);
        let begun = begun
            .map_or_else(|| "none | none".to_owned(), |errors| format!("{:.1e} | {}", errors.latents, errors.image));
        let referenced = referenced(name, &mut *brain, &mut *hand).map_or_else(
            || "none | none".to_owned(),
            |errors| format!("{:.1e} | {:.1e}", errors.states, errors.latents),
        );
        let pipeline = Pipeline::open(&folder(name)).unwrap();
        let description = pipeline.description();
        let pooled = if pooled > 0.0 { format!("{pooled:.1e}") } else { "none".to_owned() };
        let _ = writeln!(
            table,
            "| {name} | {description} | {states:.1e} | {pooled} | {latents:.1e} | {image} | {begun} | {referenced} |"
        );
    }
    if let Some(path) = std::env::var_os("EFFERENT_PARITY") {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        std::fs::write(root.join(path), table).unwrap();
    }
}

#[test]
fn engines_keep_the_contract() {
    for (name, _) in CHECKPOINTS {
        let (_, mut brain, mut hand) = open(name);
        let read = |prompt: &str, negative: &str| EmbedRequest {
            prompt: prompt.to_owned(),
            negative_prompt: negative.to_owned(),
            ..Default::default()
        };
        let long = "apple ".repeat(600);
        let requests = [read("a cat", ""), read(PROMPTS[2], NEGATIVE), read("", "")];
        testing::check_brain(&mut *brain, &requests, &read(&long, ""));
        let model = brain.spec().model.clone();
        if model.negative_prompt {
            assert!(brain.tokens(&read("a cat", &long)).unwrap_err().to_string().contains("negative_prompt takes"));
        }
        let size = Golden::open(name).size("0.guided.image");
        assert_eq!(model, hand.spec().model, "brain and hand offer the same");
        for sampler in &model.samplers {
            let render = |steps, seed, guidance_scale| RenderRequest {
                signal: embed(&mut *open(name).1, "a cat", "a dog"),
                size,
                steps,
                guidance_scale,
                seed,
                sampler: sampler.clone(),
                image_guidance_scale: 1.0,
                guidance_rescale: 0.0,
                guidance_range: 0.0..1.0,
                picture: None,
            };
            let guidance = if is_unguided(sampler) { 1.0 } else { 4.0 };
            testing::check_hand(&mut *hand, &[render(3, 1, guidance), render(5, 2, guidance), render(1, 3, guidance)]);
        }
    }
}

/// A picture's latents after each step.
fn latents(hand: &mut dyn Hand, request: &RenderRequest) -> Vec<Vec<u8>> {
    let mut sample = hand.begin(request).unwrap();
    let step = |_| {
        hand.step(&mut [&mut sample]).remove(0).unwrap();
        hand.checkpoint(&sample).unwrap()[12..].to_vec()
    };
    (0..request.steps).map(step).collect()
}

#[test]
fn two_devices_give_what_one_gives_and_only_steps_in_the_range_are_guided() {
    for (name, _) in CHECKPOINTS {
        let (_, mut brain, mut hand) = open(name);
        let (mut brain_on_two, mut hand_on_two) = open_on_two(name);
        let negative = negative(&*brain);
        let signal = embed(&mut *brain, PROMPTS[2], negative);
        assert_eq!(embed(&mut *brain_on_two, PROMPTS[2], negative), signal, "{name}");
        let whole = RenderRequest {
            signal,
            size: Golden::open(name).size("0.guided.image"),
            steps: 4,
            guidance_scale: 4.0,
            seed: 5,
            sampler: brain.spec().model.samplers[0].clone(),
            image_guidance_scale: 1.0,
            guidance_rescale: 0.0,
            guidance_range: 0.0..1.0,
            picture: None,
        };
        let guided = latents(&mut *hand, &whole);
        assert_eq!(latents(&mut *hand_on_two, &whole), guided, "{name}");
        if !brain.spec().model.guidance_range {
            continue;
        }
        let ranged = |range| RenderRequest { guidance_range: range, ..whole.clone() };
        let never = latents(&mut *hand, &ranged(0.0..0.0));
        let (late, early) = (latents(&mut *hand, &ranged(0.5..1.0)), latents(&mut *hand, &ranged(0.0..0.5)));
        assert_eq!((&late[..2], &early[..2]), (&never[..2], &guided[..2]), "{name}");
        assert!(late[2] != never[2] && early[2] != guided[2], "{name}: from the third step on the two part");
        // A step of which one sample is guided and the other is not.
        let mut samples = [ranged(0.5..1.0), ranged(0.0..0.5)].map(|request| hand.begin(&request).unwrap());
        for step in 0..4 {
            let [first, second] = &mut samples;
            assert!(hand.step(&mut [first, second]).into_iter().all(|outcome| outcome.is_ok()));
            for (sample, alone) in samples.iter().zip([&late, &early]) {
                assert_eq!(hand.checkpoint(sample).unwrap()[12..], alone[step], "{name}: mates do not matter");
            }
        }
    }
}

/// A negative prompt where there can be one.
fn negative(brain: &dyn Brain) -> &'static str {
    if brain.spec().model.negative_prompt { NEGATIVE } else { "" }
}

/// Of every other sampler, the contract is checked without guidance.
fn is_unguided(sampler: &str) -> bool {
    sampler.len().is_multiple_of(2)
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_, mut sd, mut sd_hand) = open("sd15");
    let (_, mut xl, mut xl_hand) = open("sdxl");
    let model = sd.spec().model.clone();
    let good = RenderRequest {
        signal: embed(&mut *sd, "a cat", ""),
        size: model.sizes[0],
        steps: 2,
        guidance_scale: 2.0,
        seed: 1,
        sampler: "euler".to_owned(),
        image_guidance_scale: 1.0,
        guidance_rescale: 0.0,
        guidance_range: 0.0..1.0,
        picture: None,
    };
    let message = |hand: &mut dyn Hand, request: &RenderRequest| hand.begin(request).unwrap_err().to_string();
    let other = RenderRequest { signal: embed(&mut *xl, "a cat", ""), ..good.clone() };
    let told = message(&mut *sd_hand, &other);
    assert!(told.contains("stable_diffusion/24/clip@-2+clip@-2/none"), "{told}");
    assert!(told.contains("stable_diffusion/16/clip@last/none"), "{told}");
    assert!(message(&mut *xl_hand, &good).contains("this hand accepts stable_diffusion/24"));
    let sized = |width, height| RenderRequest { size: Size { width, height }, ..good.clone() };
    for (width, height) in [(0, 16), (15, 16), (u32::MAX, 2)] {
        assert!(message(&mut *sd_hand, &sized(width, height)).contains("multiples of 2"));
    }
    assert!(message(&mut *sd_hand, &sized(2048, 2048)).contains("does not draw 2048x2048"));
    let mut stripped = signal::ControlSignal::clone(&good.signal);
    stripped.streams.pop();
    let stripped = RenderRequest { signal: Arc::new(stripped), ..good.clone() };
    assert!(message(&mut *sd_hand, &stripped).contains("no text stream of BRANCH_UNCONDITIONAL"));
    assert!(sd_hand.begin(&RenderRequest { guidance_scale: 1.0, ..stripped }).is_ok(), "nobody asks for it");
    let many = RenderRequest { sampler: "lcm".to_owned(), steps: 60, ..good.clone() };
    assert!(message(&mut *sd_hand, &many).contains("60 steps of the 50"));
    assert!(sd_hand.begin(&good).is_ok());
}

#[test]
fn what_is_declared_is_what_engines_announce() {
    for (name, _) in CHECKPOINTS {
        let (pipeline, brain, _) = open(name);
        let declared = pipeline.declared_space().unwrap();
        let model = &brain.spec().model;
        assert_eq!(signal::space_name(&declared), model.space, "{name}");
        let families = FAMILIES.into_iter().find(|(prefix, ..)| name.starts_with(prefix));
        let (_, of_brain, of_hand) = families.unwrap();
        assert_eq!((&*model.brain_family, &*model.hand_family), (of_brain, of_hand), "{name}");
        let stored = pipeline.stored().unwrap();
        let count = |role: &str| stored.iter().filter(|part| part.role == role).count();
        assert_eq!(count("hand"), 2, "{name}: a denoiser and an autoencoder");
        assert_eq!(count("brain"), pipeline.brain().config["encoders"].as_array().map_or(1, Vec::len), "{name}");
    }
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/pictogram");
    let pipeline = Pipeline::open(&shipped).unwrap();
    let shipped = pipeline.model(&pipeline.declared_space().unwrap());
    assert!(shipped.space.starts_with("pictogram/256/queries16@24/rms#"));
    assert_eq!((&*shipped.brain_family, &*shipped.hand_family), ("smollm2", "pictogram"));
}

#[test]
fn a_language_model_is_read_from_gguf() {
    for (name, architecture) in [("z-image", "qwen3"), ("sana", "gemma2")] {
        let (_, mut brain, _) = open(name);
        let root = copied(name);
        to_gguf(&root.path().join("text_encoder"), architecture);
        let pipeline = Pipeline::open(root.path()).unwrap();
        let mut from_gguf =
            brains::factory(&pipeline, Path::new("/nowhere"), vec![device()], Dtypes::default())().unwrap();
        let states = |brain: &mut dyn Brain| embed(brain, PROMPTS[1], NEGATIVE).streams.clone();
        assert_eq!(states(&mut *from_gguf), states(&mut *brain), "{name}");
        assert!(pipeline.stored().unwrap().iter().any(|part| part.files[0].ends_with("weights.gguf")));
    }
    let told = damaged("z-image", |root| to_gguf(&root.join("text_encoder"), "llama"));
    assert!(told.contains("architecture \"llama\", config.json of \"qwen3\""), "{told}");
}

/// What diffusers drew as `sized`.
fn asked(name: &str, golden: &Golden) -> GenerateRequest {
    GenerateRequest {
        model: name.to_owned(),
        steps: Some(4),
        seed: Some(32),
        size: Some(golden.size("sized.image")),
        inline_images: true,
        ..request(PROMPTS[1])
    }
}

fn check_picture(name: &str, golden: &Golden, events: &[JobEvent]) {
    let file = events.iter().find_map(|event| match &event.event {
        Some(Event::Image(image)) => Some(image.data.clone()),
        _ => None,
    });
    let picture = image::load_from_memory(&file.expect("a picture")).unwrap().to_rgb8();
    let apart = steps_apart(&picture, golden.values("sized.image"));
    assert!(apart <= 1.0, "{name}: {apart}/255");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_through_brain_and_hand() {
    for (name, _) in CHECKPOINTS {
        let pipeline = Pipeline::open(&folder(name)).unwrap();
        let golden = Golden::open(name);
        let cluster = Cluster::new().await;
        let coordinator = cluster.coordinator().await;
        let _brain =
            cluster.brain(brains::factory(&pipeline, Path::new("/nowhere"), vec![device()], Dtypes::default())).await;
        let _hand = cluster.hand(hands::factory(&pipeline, device())).await;
        cluster.settled().await;
        let mut client = coordinator.client().await;
        let mut asked = asked(name, &golden);
        check_picture(name, &golden, &generate(&mut client, asked.clone()).await);
        asked.size = Some(Size { width: 24, height: 3 });
        assert!(client.generate(asked).await.unwrap_err().message().contains("does not offer size 24x3"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn brains_and_hands_of_several_models_share_a_cluster() {
    let cluster = processes::Cluster::start(&[
        ("EFFERENT_LEDGER__LEASE", "2s"),
        ("EFFERENT_HAND__CHECKPOINT_AFTER", "1ms"),
        ("EFFERENT_HAND__CHECKPOINT_INTERVAL", "20ms"),
    ]);
    let path = |name: &str| folder(name).to_str().unwrap().to_owned();
    let mut workers = Vec::new();
    for (name, _) in CHECKPOINTS {
        for role in ["brain", "hand"] {
            workers.push(cluster.role(role, &["--model", &path(name)]).0);
        }
    }
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    for (name, _) in CHECKPOINTS {
        let golden = Golden::open(name);
        check_picture(name, &golden, &generate(&mut client, asked(name, &golden)).await);
    }

    // The same picture when its hand is killed half-way, and none when it is cancelled.
    let long = GenerateRequest {
        steps: Some(100),
        size: Some(Size { width: 160, height: 96 }),
        preview_interval: 20,
        ..asked("sd21", &Golden::open("sd21"))
    };
    let undisturbed = generate(&mut client, long.clone()).await;
    let hash = |events: &[JobEvent]| {
        let hash = |event: &JobEvent| match &event.event {
            Some(Event::Image(image)) => Some(image.hash.clone()),
            _ => None,
        };
        events.iter().find_map(hash).expect("a picture")
    };
    let mut events = client.generate(long.clone()).await.expect("accepted").into_inner();
    let mut story = Vec::new();
    let step = |event: &JobEvent| if let Some(Event::Step(step)) = &event.event { step.step } else { 0 };
    while story.iter().map(step).max().unwrap_or(0) < 30 {
        story.extend(until(&mut events, "step").await);
    }
    let hand = workers.remove(3);
    hand.kill();
    let _second = cluster.role("hand", &["--model", &path("sd21")]);
    story.extend(all(events).await);
    assert_eq!(kind(story.last().expect("an event")), "done", "{}", cluster.log());
    assert_eq!(hash(&story), hash(&undisturbed));

    let mut events = client.generate(long).await.expect("accepted").into_inner();
    let job_id = until(&mut events, "step").await[0].job_id.clone();
    client.cancel_job(CancelJobRequest { job_id: job_id.clone() }).await.expect("is running");
    all(events).await;
    assert_eq!(job(&mut client, &job_id).await.state(), JobState::Cancelled);
}
