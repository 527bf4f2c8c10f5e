//! The CPU backend.
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
pub(crate) fn forward(_op: &Fw, _plan: &Plan, _ws: Workspace) -> Result<()> {
    Ok(())
}
pub(crate) fn backward(_op: &Bw, _plan: &Plan, _ws: Workspace) -> Result<()> {
    Ok(())
}
pub(crate) fn step(_op: &Step, _plan: &Plan, _ws: Workspace) -> Result<()> {
    Ok(())
}
