//! mLSTM in safe Rust: a forward over a prompt, its gradient, and generation token by token.
//!
//!     cargo run --release --example chunkwise

use mlstm::{
    Gradients, Inputs, Outputs, ProblemSpec, Result, Saved, Scratch, Slots, State, StateMut,
    Tensor, TensorMut,
};

const B: i64 = 1;
const NH: i64 = 2;
const PROMPT: i64 = 100;
const GENERATED: i64 = 20;
const DHQK: i64 = 16;
const DHHV: i64 = 32;

/// What a model's layers compute for `s` tokens, dense: q, k (B, NH, S, DHQK), v (B, NH, S, DHHV),
/// i, f (B, NH, S).
struct Tokens {
    s: i64,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    i: Vec<f32>,
    f: Vec<f32>,
}

impl Tokens {
    fn new(s: i64, numbers: &mut impl Iterator<Item = f32>) -> Self {
        let mut take = |width: i64, offset: f32| -> Vec<f32> {
            numbers.take((B * NH * s * width) as usize).map(|x| x + offset).collect()
        };
        let (q, k) = (take(DHQK, 0.0), take(DHQK, 0.0));
        Self { s, q, k, v: take(DHHV, 0.0), i: take(1, -1.0), f: take(1, 3.0) }
    }

    fn inputs<'a>(&'a self, initial: Option<State<'a>>) -> Result<Inputs<'a>> {
        let (qk, hv, gate) = ([B, NH, self.s, DHQK], [B, NH, self.s, DHHV], [B, NH, self.s]);
        Ok(Inputs {
            q: Tensor::new(&self.q, &qk)?,
            k: Tensor::new(&self.k, &qk)?,
            v: Tensor::new(&self.v, &hv)?,
            i: Tensor::new(&self.i, &gate)?,
            f: Tensor::new(&self.f, &gate)?,
            initial,
            cu_seqlens: None,
        })
    }

    /// What does not stay at its default.
    fn problem(&self) -> ProblemSpec {
        ProblemSpec { b: B, nh: NH, s: self.s, dhqk: DHQK, dhhv: DHHV, ..ProblemSpec::default() }
    }
}

/// Memory of a state.
struct Memory {
    c: Vec<f32>,
    n: Vec<f32>,
    m: Vec<f32>,
}

impl Memory {
    fn new() -> Self {
        let size = (B * NH) as usize;
        let (qk, hv) = (DHQK as usize, DHHV as usize);
        Self { c: vec![0.0; size * qk * hv], n: vec![0.0; size * qk], m: vec![0.0; size] }
    }

    fn read(&self) -> Result<State<'_>> {
        Ok(State {
            c: Tensor::new(&self.c, &[B, NH, DHQK, DHHV])?,
            n: Tensor::new(&self.n, &[B, NH, DHQK])?,
            m: Some(Tensor::new(&self.m, &[B, NH])?),
        })
    }

    fn write(&mut self) -> Result<StateMut<'_>> {
        Ok(StateMut {
            c: TensorMut::new(&mut self.c, &[B, NH, DHQK, DHHV])?,
            n: TensorMut::new(&mut self.n, &[B, NH, DHQK])?,
            m: Some(TensorMut::new(&mut self.m, &[B, NH])?),
        })
    }
}

/// h of the tokens, with N and m per token for the backward; the state goes to `last`.
fn forward(
    tokens: &Tokens,
    initial: Option<State<'_>>,
    last: &mut Memory,
    scratch: &mut Scratch,
) -> Result<[Vec<f32>; 3]> {
    let gates = (B * NH * tokens.s) as usize;
    let (mut h, mut n, mut m) = (vec![0.0; tokens.v.len()], vec![0.0; gates], vec![0.0; gates]);
    let mut outputs = Outputs {
        h: TensorMut::new(&mut h, &[B, NH, tokens.s, DHHV])?,
        n: Some(TensorMut::new(&mut n, &[B, NH, tokens.s])?),
        m: Some(TensorMut::new(&mut m, &[B, NH, tokens.s])?),
        last: Some(last.write()?),
    };
    mlstm::chunkwise_fw(&tokens.problem(), &tokens.inputs(initial)?, &mut outputs, scratch)?;
    Ok([h, n, m])
}

/// The gradient of sum(h^2) / 2 with respect to v.
fn gradient(tokens: &Tokens, [h, n, m]: &[Vec<f32>; 3], scratch: &mut Scratch) -> Result<Vec<f32>> {
    let (hv, gate) = ([B, NH, tokens.s, DHHV], [B, NH, tokens.s]);
    let qk = [B, NH, tokens.s, DHQK];
    let saved = Saved {
        h: Some(Tensor::new(h, &hv)?),
        n: Some(Tensor::new(n, &gate)?),
        m: Some(Tensor::new(m, &gate)?),
        dh: Tensor::new(h, &hv)?,
        dc_last: None,
        dn_last: None,
        dm_last: None,
    };
    let zeros = |like: &Vec<f32>| vec![0.0; like.len()];
    let (mut dq, mut dk, mut dv) = (zeros(&tokens.q), zeros(&tokens.k), zeros(&tokens.v));
    let (mut di, mut df) = (zeros(&tokens.i), zeros(&tokens.f));
    let mut gradients = Gradients {
        dq: TensorMut::new(&mut dq, &qk)?,
        dk: TensorMut::new(&mut dk, &qk)?,
        dv: TensorMut::new(&mut dv, &hv)?,
        di: TensorMut::new(&mut di, &gate)?,
        df: TensorMut::new(&mut df, &gate)?,
        initial: None,
    };
    let inputs = tokens.inputs(None)?;
    mlstm::chunkwise_bw(&tokens.problem(), &inputs, &saved, &mut gradients, scratch)?;
    Ok(dv)
}

/// One token at a time; the state is updated in place.
fn generate(token: &Tokens, state: &mut Memory, scratch: &mut Scratch) -> Result<Vec<f32>> {
    let mut h = vec![0.0; token.v.len()];
    let mut out = TensorMut::new(&mut h, &[B, NH, 1, DHHV])?;
    let inputs = token.inputs(None)?;
    mlstm::step(
        &token.problem(),
        &inputs,
        &mut state.write()?,
        &Slots::default(),
        &mut out,
        scratch,
    )?;
    Ok(h)
}

fn main() -> Result<()> {
    let mut seed = 1u32;
    let mut numbers = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed as f32 / u32::MAX as f32 * 2.0 - 1.0
    });
    let mut scratch = Scratch::new();

    let prompt = Tokens::new(PROMPT, &mut numbers);
    let mut state = Memory::new();
    let saved = forward(&prompt, None, &mut state, &mut scratch)?;
    let dv = gradient(&prompt, &saved, &mut scratch)?;
    // h is linear in v, so <dv, v> is twice the loss.
    let energy: f32 = saved[0].iter().map(|h| h * h).sum();
    let along: f32 = dv.iter().zip(&prompt.v).map(|(dv, v)| dv * v).sum();
    println!("{PROMPT} tokens at once: sum(h^2) = {energy:.4}, <dv, v> = {along:.4}");
    assert!((energy - along).abs() < 1e-3 * energy);

    // From here a forward with this initial state and steps in place give the same numbers.
    let mut difference = 0f32;
    for _ in 0..GENERATED {
        let token = Tokens::new(1, &mut numbers);
        let mut last = Memory::new();
        let [expected, ..] = forward(&token, Some(state.read()?), &mut last, &mut scratch)?;
        let h = generate(&token, &mut state, &mut scratch)?;
        difference = expected.iter().zip(&h).fold(difference, |d, (a, b)| d.max((a - b).abs()));
    }
    println!("{GENERATED} tokens one by one: off by at most {difference:.1e}");
    assert!(difference < 1e-4);
    Ok(())
}
