//! Hand worker: control signal to image.
