//! Building blocks of models, shared by families of brains and hands.
//!
//! Read in this order: [`ops`] (element-wise operations and norms), [`linear`], [`attention`] (the one attention, with an additive
//! bias), [`decoder`] (decoder language models by configuration), [`conv`] (convolution), [`rows`] (a batch's rows on
//! threads of their own), `product` and `kernels` (what runs on CPU).
//!
//! On CPU and in f32 the operations run fused kernels of our own; elsewhere they are composed of candle's. Tests compare the two.
//! Every operation computes each row of a batch in an order that does not depend on the batch.

pub mod attention;
pub mod conv;
pub mod decoder;
mod kernels;
pub mod linear;
pub mod ops;
mod product;
pub mod rows;

pub use product::MAX_ROWS;
