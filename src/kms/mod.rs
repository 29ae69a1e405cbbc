//! Key management services: who wraps and unwraps a volume's data key.
//!
//! [`KeyProvider`] has one implementation a provider. A provider knows nothing of volumes but the
//! encryption context that binds a wrapped key to one of them.

pub mod embedded;
