//! The one error type. Every message names the argument, what was expected and what came.

use thiserror::Error;

/// Why a call was refused or failed. Nothing has been written when one of these is returned.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument breaks the contract: the caller has a bug.
    #[error("{argument}: expected {expected}, got {got}")]
    InvalidArgument {
        /// The argument's name as in the C header, e.g. `q` or `problem.dhqk`.
        argument: String,
        /// What the contract asks for.
        expected: String,
        /// What the caller passed.
        got: String,
    },
    /// A valid request that this build has no kernel for: fall back or ask for less.
    #[error("{argument}: {reason}")]
    Unsupported {
        /// The argument that asks for it.
        argument: String,
        /// What is missing, and what to do instead.
        reason: String,
    },
    /// The workspace is smaller than `mlstm_query` says.
    #[error("workspace: expected at least {expected} bytes (ask mlstm_query), got {got}")]
    WorkspaceTooSmall {
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The device or its driver is missing or refused the work.
    #[error("device: {0}")]
    Device(String),
    /// A bug in this library.
    #[error("internal error in mlstm: {0}; please report it")]
    Internal(String),
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub(crate) fn invalid(
        argument: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::InvalidArgument {
            argument: argument.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    /// An [`Error::Unsupported`].
    pub(crate) fn unsupported(argument: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { argument: argument.into(), reason: reason.into() }
    }
}

/// Shorthand used throughout the crate.
pub type Result<T> = std::result::Result<T, Error>;
