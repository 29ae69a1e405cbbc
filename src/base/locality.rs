//! Where a KMS of our own says that it is: what stands in its ARNs and in events.

/// The region and account in the ARNs of the embedded KMS, and in events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locality {
    /// The region: lower-case letters, digits and hyphens; `us-east-1` by default.
    pub region: String,
    /// The account: 12 digits; `000000000000` by default.
    pub account: String,
}

impl Default for Locality {
    fn default() -> Self {
        Locality { region: "us-east-1".into(), account: "000000000000".into() }
    }
}
