//! Waves: as many lanes at a time as there is room for their chunk states.

use super::lanes::Lanes;
use super::layout::{Layout, WAVE};
use super::states::Active;
use crate::dispatch::Plan;
use crate::error::Result;
use crate::problem::Problem;
use crate::tensor::View;
use crate::workspace::Workspace;

/// The layout of a call's workspace, which must be large enough, and its lanes.
pub(crate) fn prepare<T>(
    problem: &Problem,
    plan: &Plan,
    workspace: &Workspace,
    cu_seqlens: Option<View>,
) -> Result<(Layout, Lanes)> {
    let layout = Layout::new::<T>(problem, plan)?;
    workspace.check(layout.bytes)?;
    let lanes = Lanes::new(problem, layout.chunk, layout.chunks_per_head, cu_seqlens)?;
    Ok((layout, lanes))
}

/// Calls `work` with consecutive lanes, all of them in the end.
pub(crate) fn for_each_wave(
    lanes: &Lanes,
    layout: &Layout,
    backward: bool,
    mut work: impl FnMut(&[Active]),
) {
    let mut wave = [Active::default(); WAVE];
    let (mut count, mut slots) = (0, 0);
    for index in 0..lanes.count() {
        let lane = lanes.get(index);
        let needed = Layout::slots_of(lane.len.div_ceil(layout.chunk), layout.group, backward);
        if count == WAVE || slots + needed > layout.slots {
            work(&wave[..count]);
            (count, slots) = (0, 0);
        }
        wave[count] = Active::new(lane, layout, slots);
        count += 1;
        slots += needed;
    }
    if count > 0 {
        work(&wave[..count]);
    }
}
