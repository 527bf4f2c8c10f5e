//! How the sweeps for dq and dk of the Hopper backward take turns at parts of DHHV
//! (`kernels/backward_sm90.cuh`).

use std::ops::Range;

use super::hopper_backward::{DK_VECTORS, DQ_VECTORS, Records, Tiles};
use super::layout::ceil_div;
use super::maps;
use super::params::{self, Args, Tensor, TensorMap};
use super::sweeps::Sweep;
use crate::error::Result;
use crate::ops::BwTensors;
use crate::problem::Problem;
use crate::tensor::View;

/// Most columns of DHHV that the sweeps hold.
pub(super) const MOST_COLUMNS: i64 = 512;

/// The parts of DHHV. Only kernels for full ones add to what others left, so that what is not full
/// comes first.
fn parts(dhhv: i64) -> impl Iterator<Item = Range<i64>> {
    let full = dhhv / MOST_COLUMNS;
    let rest = full * MOST_COLUMNS..dhhv;
    let rest = (!rest.is_empty()).then_some(rest);
    rest.into_iter().chain((0..full).map(|part| part * MOST_COLUMNS..(part + 1) * MOST_COLUMNS))
}

/// Parts of <dC, C> at a boundary: one from each warp with a state, of all turns.
pub(super) const fn boundary_parts(problem: &Problem) -> i64 {
    let (full, rest) = (problem.dhhv / MOST_COLUMNS, problem.dhhv % MOST_COLUMNS);
    let rest = if rest > 0 { warps(problem, rest) } else { 0 };
    full * warps(problem, MOST_COLUMNS) + rest
}

/// Warps with a state in a turn at so many columns.
const fn warps(problem: &Problem, columns: i64) -> i64 {
    4 * Sweep::of(problem.dhqk, columns).units()
}

/// The sweeps of one part.
pub(super) struct Turn {
    pub(super) sweep: Sweep,
    pub(super) args: Args,
    pub(super) dq: [TensorMap; 8],
    pub(super) dk: [TensorMap; 8],
}

/// All turns in order, of a backward with these arguments.
pub(super) fn turns(
    p: &Problem,
    t: &BwTensors,
    all: &Args,
    records: &Records,
) -> Result<Vec<Turn>> {
    let count = parts(p.dhhv).count();
    let rho_columns = Sweep::of(p.dhhv, p.dhqk).block();
    let mut boundary_part = 0;
    let turn = |(index, columns): (usize, Range<i64>)| {
        let (first, width) = (columns.start, columns.end - columns.start);
        let sweep = Sweep::of(p.dhqk, width);
        let mut args = *all;
        args.dhhv = params::size("dhhv", width)?;
        args.parts_before = index as i32;
        args.parts_after = (count - 1 - index) as i32;
        for state in [&mut args.c_initial, &mut args.dc_last, &mut args.dc_initial] {
            *state = state.at_column(first);
        }
        if index > 0 {
            // dn is a sum over parts.
            args.dn_last = Tensor::ABSENT;
        }
        args.buffers.segment_c = args.buffers.segment_c.wrapping_add(4 * first as usize);
        args.buffers.boundary_e = args.buffers.boundary_e.wrapping_add(4 * boundary_part as usize);
        boundary_part += warps(p, width);

        args.rho_parts = params::size("dhhv", ceil_div(width, rho_columns))?;
        let rho = args.buffers.rho.wrapping_add(256 * (first / rho_columns) as usize);
        let pitch = 256 * all.rho_parts as usize;
        let rho = maps::rows_map(rho, records.vectors.count, pitch, 256 * args.rho_parts as usize)?;
        let records = records.with_rho(rho);
        let [dh, v] = [&t.dh, &t.v].map(|view| columns_of(view, &columns));
        Ok(Turn {
            dq: Tiles::dq(t, &dh, &v).maps(&sweep, &records, DQ_VECTORS)?,
            dk: Tiles::dk(t, &dh, &v).maps(&sweep, &records, DK_VECTORS)?,
            sweep,
            args,
        })
    };
    parts(p.dhhv).enumerate().map(turn).collect()
}

/// Some columns of a tensor of 16 bits.
fn columns_of(view: &View, columns: &Range<i64>) -> View {
    let mut part = *view;
    part.data = view.data.wrapping_add(2 * columns.start as usize);
    part.shape[3] = columns.end - columns.start;
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Op, ProblemSpec};

    #[test]
    fn parts_cover_dhhv_and_full_ones_come_last() {
        for slabs in 1..100 {
            let all: Vec<_> = parts(64 * slabs).collect();
            let mut sorted = all.clone();
            sorted.sort_by_key(|part| part.start);
            assert_eq!((sorted[0].start, sorted[sorted.len() - 1].end), (0, 64 * slabs));
            assert!(sorted.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(all.iter().all(|part| part.start % MOST_COLUMNS == 0));
            assert!(all.iter().skip(1).all(|part| part.end - part.start == MOST_COLUMNS));
        }
    }

    #[test]
    fn boundary_parts_are_those_of_all_turns() {
        for (dhqk, dhhv) in [(64, 64), (192, 512), (256, 576), (512, 1024), (128, 1216)] {
            let spec = ProblemSpec { b: 1, nh: 1, s: 1, dhqk, dhhv, ..ProblemSpec::default() };
            let problem = spec.validate(Op::ChunkwiseBw).unwrap();
            let sum: i64 = parts(dhhv).map(|part| warps(&problem, part.end - part.start)).sum();
            assert_eq!(boundary_parts(&problem), sum);
        }
    }
}
