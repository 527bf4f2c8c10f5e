//! Status codes, the per-thread message, and the panic guard around every export.

use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::types::*;
use crate::error::{Error, Result};

thread_local! {
    /// The message of this thread's last call, with its NUL; empty after a success.
    static MESSAGE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn code(error: &Error) -> mlstm_status {
    match error {
        Error::InvalidArgument { .. } => MLSTM_INVALID_ARGUMENT,
        Error::Unsupported { .. } => MLSTM_UNSUPPORTED,
        Error::WorkspaceTooSmall { .. } => MLSTM_WORKSPACE_TOO_SMALL,
        Error::Device(_) => MLSTM_DEVICE_ERROR,
        Error::Internal(_) => MLSTM_INTERNAL_ERROR,
    }
}

fn store(message: &str) {
    // A thread that is being torn down has no message any more; the status code still tells.
    let _ = MESSAGE.try_with(|cell| {
        let mut buffer = cell.borrow_mut();
        buffer.clear();
        buffer.extend(message.bytes().filter(|&byte| byte != 0));
        buffer.push(0);
    });
}

/// Runs an export's body; turns errors and panics into a status and this thread's message.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> mlstm_status {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic".into());
        Err(Error::Internal(what))
    });
    match outcome {
        Ok(()) => {
            store("");
            MLSTM_OK
        }
        Err(error) => {
            store(&error.to_string());
            code(&error)
        }
    }
}

pub(super) fn last_message() -> *const c_char {
    MESSAGE
        .try_with(|cell| {
            let buffer = cell.borrow();
            if buffer.is_empty() { c"".as_ptr() } else { buffer.as_ptr().cast() }
        })
        .unwrap_or(c"".as_ptr())
}

pub(super) fn name(status: mlstm_status) -> &'static CStr {
    match status {
        MLSTM_OK => c"MLSTM_OK",
        MLSTM_INVALID_ARGUMENT => c"MLSTM_INVALID_ARGUMENT",
        MLSTM_UNSUPPORTED => c"MLSTM_UNSUPPORTED",
        MLSTM_WORKSPACE_TOO_SMALL => c"MLSTM_WORKSPACE_TOO_SMALL",
        MLSTM_DEVICE_ERROR => c"MLSTM_DEVICE_ERROR",
        MLSTM_INTERNAL_ERROR => c"MLSTM_INTERNAL_ERROR",
        _ => c"unknown status",
    }
}
