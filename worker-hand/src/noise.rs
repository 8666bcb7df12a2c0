//! Noise equal to `torch.randn(.., generator=torch.Generator().manual_seed(seed))` on CPU.
//!
//! Pictures can so be compared with those of PyTorch programs. Source: PyTorch 2.15, `aten/src/ATen/core/MT19937RNGEngine.h`
//! (generator), `DistributionsHelper.h` (uniform and scalar normal), `native/cpu/DistributionTemplates.h` (`normal_fill`).
//! Uniform numbers are exact; normal ones agree to the last bits of `log`, `sin` and `cos` (PyTorch's vectorised forms of
//! them differ from libm by about 1e-6 at most).

const N: usize = 624;
const M: usize = 397;

/// Mersenne Twister 19937, 32 bits.
pub struct MersenneTwister {
    state: [u32; N],
    next: usize,
}

impl std::fmt::Debug for MersenneTwister {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MersenneTwister").field("next", &self.next).finish_non_exhaustive()
    }
}

impl MersenneTwister {
    /// The state of PyTorch's `manual_seed(seed)`, which uses the low 32 bits of the seed and no more: seeds that differ
    /// only above them give the same numbers.
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        let (high, low) = (u64::from(self.next_u32()), u64::from(self.next_u32()));
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }
}

/// `count` values of N(0, 1), in the order in which PyTorch fills a contiguous tensor.
pub fn randn(seed: u64, count: usize) -> Vec<f32> {
    Noise::new(seed).normal(count)
}

/// A generator that tensor after tensor is drawn from.
#[derive(Debug)]
pub struct Noise {
    random: MersenneTwister,
    /// The second of two normal values that short tensors are drawn with, until it is wanted.
    second: Option<f64>,
}

impl Noise {
    /// A generator of this seed.
    pub fn new(seed: u64) -> Self {
        Self { random: MersenneTwister::new(seed), second: None }
    }

    /// The next tensor of `count` values of N(0, 1).
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        let random = &mut self.random;
        if count < 16 {
            return (0..count).map(|_| self.scalar() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| random.uniform_f32()).collect();
        for chunk in values.as_chunks_mut::<16>().0 {
            box_muller(chunk);
        }
        if !count.is_multiple_of(16) {
            // PyTorch draws the last 16 values anew, so that its vector code has whole vectors.
            let mut tail: [f32; 16] = std::array::from_fn(|_| random.uniform_f32());
            box_muller(&mut tail);
            values[count - 16..].copy_from_slice(&tail);
        }
        values
    }

    /// Short tensors are drawn in f64, two at a time.
    fn scalar(&mut self) -> f64 {
        if let Some(second) = self.second.take() {
            return second;
        }
        let (u1, u2) = (self.random.uniform_f64(), self.random.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = std::f64::consts::TAU * u1;
        self.second = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

fn box_muller(values: &mut [f32; 16]) {
    for j in 0..8 {
        let (u1, u2) = (1.0 - values[j], values[j + 8]);
        let radius = (-2.0 * u1.ln()).sqrt();
        let theta = std::f32::consts::TAU * u2;
        values[j] = radius * theta.cos();
        values[j + 8] = radius * theta.sin();
    }
}
