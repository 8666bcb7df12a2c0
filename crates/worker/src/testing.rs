//! The conformance kit: the engine contract, run against any engine. With the cargo feature `testing`.
//!
//! Checks panic with what went wrong; they are for tests. What should be equal must be so to the bit, which is what families promise on CPU.

#![cfg(feature = "testing")]

use efferent_proto::internal::ControlStream;
use image::RgbImage;

use crate::{
    engine::{Brain, EmbedRequest, Hand, RenderRequest, Sample},
    signal,
};

/// Runs the contract of a hand on requests that it must be able to render: at least two, of equal key, of several lengths.
///
/// # Panics
/// If the hand breaks the contract.
#[expect(clippy::expect_used, reason = "a check fails by panicking")]
pub fn check_hand(hand: &mut dyn Hand, requests: &[RenderRequest]) {
    assert!(requests.len() >= 2, "the kit wants several requests");
    let begin = |hand: &mut dyn Hand, request| hand.begin(request).expect("the request can be rendered");
    let alone: Vec<RgbImage> = requests
        .iter()
        .map(|request| {
            let sample = begin(hand, request);
            complete(hand, sample)
        })
        .collect();
    for (request, picture) in requests.iter().zip(&alone) {
        assert_eq!(picture.dimensions(), (request.size.width, request.size.height));
    }

    // The same again: nothing is random, and a request leaves nothing behind.
    let again = begin(hand, &requests[0]);
    assert!(complete(hand, again) == alone[0], "the same request gave another picture");

    // A batch equals its singles; samples leave it as they are done, one joins late, one is dropped half-way.
    let mut late = Some(begin(hand, &requests[0]));
    let dropped = begin(hand, &requests[1]);
    let mut batch: Vec<(usize, Sample)> =
        requests.iter().enumerate().skip(1).map(|(index, request)| (index, begin(hand, request))).collect();
    assert!(batch.iter().all(|(_, sample)| sample.key == dropped.key), "the kit wants requests of one key");
    batch.push((usize::MAX, dropped));
    let mut done = 0;
    while !batch.is_empty() {
        let mut samples: Vec<&mut Sample> = batch.iter_mut().map(|(_, sample)| sample).collect();
        let outcomes = hand.step(&mut samples);
        assert_eq!(outcomes.len(), batch.len(), "one outcome for each sample");
        outcomes.into_iter().for_each(|outcome| outcome.expect("a step of good samples succeeds"));
        batch.retain(|(index, _)| *index != usize::MAX);
        if let Some(late) = late.take() {
            batch.push((0, late));
        }
        let (complete, rest): (Vec<_>, Vec<_>) = batch.into_iter().partition(|(_, sample)| sample.is_complete());
        batch = rest;
        for (index, sample) in complete {
            let picture = hand.finish(sample).expect("a complete sample becomes a picture");
            alike(&picture, &alone[index], "in a batch");
            done += 1;
        }
    }
    assert_eq!(done, requests.len());

    // A preview changes nothing, and going on from a checkpoint equals never having stopped.
    for stop in 0..=begin(hand, &requests[0]).steps {
        let mut sample = begin(hand, &requests[0]);
        for _ in 0..stop {
            step(hand, &mut sample);
        }
        hand.preview(&sample).expect("a sample has a preview");
        let kept = hand.checkpoint(&sample).expect("a sample has a checkpoint");
        drop(sample);
        let resumed = hand.resume(&requests[0], &kept).expect("a checkpoint can be taken up");
        assert_eq!(resumed.step, stop);
        alike(&complete(hand, resumed), &alone[0], "after a checkpoint");
        for hostile in [&kept[..kept.len() / 2], &[0xff; 64], &[]] {
            assert!(hand.resume(&requests[0], hostile).is_err(), "a broken checkpoint was taken up");
        }
    }
}

fn step(hand: &mut dyn Hand, sample: &mut Sample) {
    let before = sample.step;
    let outcomes: Result<Vec<()>, _> = hand.step(&mut [&mut *sample]).into_iter().collect();
    assert!(outcomes.is_ok_and(|outcomes| outcomes.len() == 1), "a step of a good sample succeeds");
    assert_eq!(sample.step, before + 1, "a step is a step");
}

#[expect(clippy::expect_used, reason = "a check fails by panicking")]
fn complete(hand: &mut dyn Hand, mut sample: Sample) -> RgbImage {
    while !sample.is_complete() {
        step(hand, &mut sample);
    }
    hand.finish(sample).expect("a complete sample becomes a picture")
}

fn alike(a: &RgbImage, b: &RgbImage, when: &str) {
    assert_eq!(a.dimensions(), b.dimensions());
    let difference = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
    assert_eq!(difference, 0, "{when} a picture differs");
}

/// Runs the contract of a brain on requests that it must be able to read, of several lengths, and one that it refuses.
///
/// # Panics
/// If the brain breaks the contract.
#[expect(clippy::expect_used, reason = "a check fails by panicking")]
pub fn check_brain(brain: &mut dyn Brain, requests: &[EmbedRequest], refused: &EmbedRequest) {
    let alone: Vec<Vec<f32>> = requests
        .iter()
        .map(|request| {
            assert!(brain.tokens(request).expect("the prompt can be read") > 0);
            values(brain, std::slice::from_ref(request)).remove(0).expect("the prompt can be read")
        })
        .collect();
    assert!(brain.tokens(refused).is_err(), "what is refused is refused before the batch");
    let mut batch = requests.to_vec();
    batch.insert(1, refused.clone());
    let mut together = values(brain, &batch);
    assert!(together.remove(1).is_none(), "a bad request fails alone");
    for (alone, together) in alone.iter().zip(together) {
        let together = together.expect("a bad request leaves its mates alone");
        let difference = alone.iter().zip(&together).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(*alone == together, "in a batch a signal differs, by {difference}");
    }
    assert!(brain.embed(&[]).is_empty());
}

/// All values of each signal, `None` for errors.
#[expect(clippy::expect_used, reason = "a check fails by panicking")]
fn values(brain: &mut dyn Brain, batch: &[EmbedRequest]) -> Vec<Option<Vec<f32>>> {
    let outcomes = brain.embed(batch);
    assert_eq!(outcomes.len(), batch.len(), "one outcome for each request");
    let read = |stream: &ControlStream| {
        let tensor = signal::tensor(stream, &candle_core::Device::Cpu).expect("a stream is well-formed");
        tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values of a tensor")
    };
    let signal = |outcome: Result<signal::ControlSignal, _>| {
        let signal = outcome.ok()?;
        Some(signal.streams.iter().flat_map(read).collect())
    };
    outcomes.into_iter().map(signal).collect()
}
