//! The CPU backend.
#[allow(
    clippy::indexing_slicing,
    reason = "the oracle is read by people; its sizes are checked by its callers"
)]
pub mod reference;
mod standin;

use crate::dispatch::Plan;
use crate::error::Result;
use crate::ops::{Bw, Fw, Step};
use crate::problem::Problem;
use crate::workspace::Workspace;

pub(crate) fn threads() -> usize {
    1
}
pub(crate) fn preload() {}
pub(crate) fn workspace_size(_problem: &Problem, _plan: &Plan) -> Result<usize> {
    Ok(0)
}
pub(crate) fn forward(op: &Fw, _plan: &Plan, _ws: Workspace) -> Result<()> {
    standin::forward(op)
}
pub(crate) fn backward(op: &Bw, _plan: &Plan, _ws: Workspace) -> Result<()> {
    standin::backward(op)
}
pub(crate) fn step(op: &Step, _plan: &Plan, _ws: Workspace) -> Result<()> {
    standin::step(op)
}
