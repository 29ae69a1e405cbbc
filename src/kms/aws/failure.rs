//! What the SDK reports, as a [`KmsError`]: the KMS's own words where it spoke, else why it was not reached.

use crate::kms::KmsError;
use crate::kms::aws::plain_http::InTheClear;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use std::error::Error;

/// The longest text of a peer's that is passed on, in characters.
const WORDS_MAX: usize = 2048;

/// The error for a failed request to `endpoint`.
pub(super) fn of<E>(error: SdkError<E>, endpoint: &str) -> KmsError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    // Also where it kept somebody from getting credentials.
    if let Some(refused) = chain(&error).find_map(|e| e.downcast_ref::<InTheClear>()) {
        return KmsError::Validation(refused.to_string());
    }
    match &error {
        SdkError::ServiceError(service) => {
            let meta = service.err().meta();
            match meta.code() {
                Some(name) => {
                    KmsError::of_wire(&printable(name), printable(meta.message().unwrap_or_default()))
                }
                None => foreign(endpoint, service.raw().status().as_u16()),
            }
        }
        SdkError::ResponseError(response) => foreign(endpoint, response.raw().status().as_u16()),
        SdkError::TimeoutError(_) => unreachable(endpoint, "no answer in time"),
        other => match credentials(other) {
            Some(problem) => problem,
            None if is_networks(other) => unreachable(endpoint, &deepest(other)),
            None => KmsError::Validation(format!("AWS is not set up rightly: {}", deepest(other))),
        },
    }
}

/// Whether it failed on the way, and not because nobody could say where to go: no endpoint
/// fits what is configured.
fn is_networks<E>(error: &SdkError<E>) -> bool
where
    E: Error + 'static,
{
    let by_kind = match error {
        SdkError::DispatchFailure(failure) => failure.is_io() || failure.is_timeout(),
        _ => false,
    };
    by_kind || chain(error).any(|e| e.is::<std::io::Error>() || e.is::<hyper::Error>())
}

/// Transport: nobody answered at `endpoint`.
pub(super) fn unreachable(endpoint: &str, why: &str) -> KmsError {
    KmsError::Transport(format!("could not reach {endpoint}: {why}"))
}

/// Somebody answered who is no KMS: a proxy, a load balancer, a wrong address.
fn foreign(endpoint: &str, status: u16) -> KmsError {
    unreachable(
        endpoint,
        &format!("what answers there is no KMS, or its answer was cut off (HTTP status {status})"),
    )
}

/// What is wrong with this host's credentials, if that is what is wrong. What may pass (an instance's
/// metadata service that does not answer) is Transport.
fn credentials(error: &(dyn Error + 'static)) -> Option<KmsError> {
    let problem = chain(error).find_map(|e| e.downcast_ref::<CredentialsError>())?;
    Some(match problem {
        CredentialsError::CredentialsNotLoaded(_) => KmsError::AccessDenied(
            "there are no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, \
             or give this machine a role (docs/kms.md)"
                .into(),
        ),
        CredentialsError::InvalidConfiguration(_) => {
            KmsError::Validation(format!("the AWS credentials are not set up rightly: {}", deepest(problem)))
        }
        _ => KmsError::Transport(format!("could not get AWS credentials: {}", deepest(problem))),
    })
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |e: &&'a (dyn Error + 'static)| (*e).source())
}

/// The cause behind all others, which says most.
fn deepest(error: &(dyn Error + 'static)) -> String {
    chain(error).last().map_or_else(String::new, |e| printable(&e.to_string()))
}

/// A peer's text, without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().take(WORDS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
