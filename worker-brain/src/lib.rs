//! Brain worker: prompt to control signal.
