//! Threads: a batch's rows side by side, each on a thread of its own ([`by_row`], [`by_large_row`]), or all threads for one computation ([`on_pool`]).
//!
//! A small network gains little from threads inside each of its products: they cost more to wake than they save. Rows do not need one another, so
//! on CPU each is computed alone by one thread. A row's values then do not depend on what else is in the batch, to the bit.

use std::sync::LazyLock;

use candle_core::{Result, Tensor};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Pools of one thread, as many as the machine is to use: whatever a row's computation would share out stays on its thread.
static LONE: LazyLock<Vec<ThreadPool>> = LazyLock::new(|| {
    let pool = |index: usize| ThreadPoolBuilder::new().num_threads(1).thread_name(move |_| format!("row-{index}"));
    (0..rayon::current_num_threads()).filter_map(|index| pool(index).build().ok()).collect()
});

/// Computes on a thread of the pool: each operation in it that shares out its work then need not wake the pool from outside.
pub fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// `forward` of tensors that share their first axis, row by row on CPU, at once elsewhere. Each row keeps its axis, of length 1.
///
/// # Errors
/// As `forward`; or if a tensor has fewer rows than the first.
pub fn by_row(inputs: &[&Tensor], forward: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) -> Result<Tensor> {
    let Some(first) = inputs.first() else { candle_core::bail!("no tensor, no rows") };
    let rows = first.dim(0)?;
    if !first.device().is_cpu() || rows == 0 {
        return forward(&inputs.iter().map(|input| (*input).clone()).collect::<Vec<_>>());
    }
    let row = |index: usize| {
        let row: Result<Vec<Tensor>> = inputs.iter().map(|input| input.narrow(0, index, 1)?.contiguous()).collect();
        forward(&row?)
    };
    let threads = LONE.len().min(rows).max(1);
    let mut outcomes: Vec<Vec<(usize, Result<Tensor>)>> = (0..threads).map(|_| Vec::new()).collect();
    share(&LONE, &mut outcomes, 0, &|thread: usize| {
        (thread..rows).step_by(threads).map(|index| (index, row(index))).collect()
    });
    let mut outcomes: Vec<_> = outcomes.into_iter().flatten().collect();
    outcomes.sort_unstable_by_key(|(index, _)| *index);
    let values = outcomes.into_iter().map(|(_, outcome)| outcome).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&values, 0)
}

/// As [`by_row`], for networks large enough to keep every thread busy with one row: fewer rows than threads are computed one after the other, each on all of them.
///
/// # Errors
/// As [`by_row`].
pub fn by_large_row(inputs: &[&Tensor], forward: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) -> Result<Tensor> {
    let rows = inputs.first().map_or(Ok(0), |first| first.dim(0))?;
    let on_cpu = inputs.first().is_some_and(|first| first.device().is_cpu());
    if !on_cpu || rows == 0 || rows >= LONE.len() {
        return by_row(inputs, forward);
    }
    let row = |index: usize| {
        let row: Result<Vec<Tensor>> = inputs.iter().map(|input| input.narrow(0, index, 1)?.contiguous()).collect();
        let row = row?;
        on_pool(|| forward(&row))
    };
    Tensor::cat(&(0..rows).map(row).collect::<Result<Vec<_>>>()?, 0)
}

/// Has each pool fill one of `outcomes`, and waits for all.
fn share<T: Send>(pools: &[ThreadPool], outcomes: &mut [T], thread: usize, work: &(impl Fn(usize) -> T + Sync)) {
    let Some((outcome, rest)) = outcomes.split_first_mut() else { return };
    match pools.first() {
        Some(pool) => pool.in_place_scope(|scope| {
            scope.spawn(move |_| *outcome = work(thread));
            share(&pools[1..], rest, thread + 1, work);
        }),
        None => {
            *outcome = work(thread);
            share(pools, rest, thread + 1, work);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn rows_are_those_of_the_whole_and_do_not_depend_on_their_mates() {
        let x = Tensor::randn(0f32, 1.0, (5, 7, 64), &Device::Cpu).unwrap();
        let w = Tensor::randn(0f32, 1.0, (64, 96), &Device::Cpu).unwrap();
        let t = Tensor::arange(0f32, 5.0, &Device::Cpu).unwrap();
        let forward = |inputs: &[Tensor]| {
            let rows = inputs[0].dim(0)?;
            let y = inputs[0].reshape((rows * 7, 64))?.matmul(&w)?.reshape((rows, 7, 96))?;
            y.broadcast_add(&inputs[1].reshape((rows, 1, 1))?)
        };
        let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let whole = values(forward(&[x.clone(), t.clone()]).unwrap());
        let all = by_row(&[&x, &t], forward).unwrap();
        assert_eq!(all.dims(), [5, 7, 96]);
        let one = by_row(&[&x.narrow(0, 3, 1).unwrap(), &t.narrow(0, 3, 1).unwrap()], forward).unwrap();
        assert_eq!(values(all.narrow(0, 3, 1).unwrap()), values(one));
        assert!(values(all).iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    #[test]
    fn one_large_row_is_what_it_is_in_a_batch() {
        let count = LONE.len() + 1;
        let x = Tensor::randn(0f32, 1.0, (count, 200, 512), &Device::Cpu).unwrap();
        let w = Tensor::randn(0f32, 1.0, (512, 768), &Device::Cpu).unwrap();
        let forward = |inputs: &[Tensor]| inputs[0].squeeze(0)?.matmul(&w)?.unsqueeze(0);
        let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let all = by_large_row(&[&x], forward).unwrap();
        let one = by_large_row(&[&x.narrow(0, 1, 1).unwrap()], forward).unwrap();
        assert_eq!(values(all.narrow(0, 1, 1).unwrap()), values(one));
        assert!(by_large_row(&[], forward).is_err());
    }

    #[test]
    fn a_row_that_fails_fails_the_batch() {
        let x = Tensor::zeros((4, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let short = Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(by_row(&[&x, &short], |inputs| Ok(inputs[0].clone())).is_err());
        assert!(by_row(&[], |_| Ok(x.clone())).is_err());
        assert!(by_row(&[&x], |_| candle_core::bail!("no")).is_err());
    }
}
