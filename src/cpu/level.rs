//! Which SIMD instructions the kernels may use: detected once, lowered by `MLSTM_CPU_LEVEL`.

use std::sync::OnceLock;

/// Instruction sets with a kernel table of their own, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// The target's baseline (SSE2 on x86-64), no fused multiply-add.
    Scalar,
    /// NEON, the baseline of aarch64.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The levels this machine can run, lowest first.
    pub(crate) fn available() -> &'static [Self] {
        static LEVELS: OnceLock<Vec<Level>> = OnceLock::new();
        LEVELS.get_or_init(|| {
            #[allow(unused_mut, reason = "nothing to add on other targets")]
            let mut levels = vec![Self::Scalar];
            #[cfg(target_arch = "aarch64")]
            levels.push(Self::Neon);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                levels.push(Self::Avx2);
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    levels.push(Self::Avx512);
                }
            }
            levels
        })
    }

    /// The name in `MLSTM_CPU_LEVEL`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }

    /// The highest available level, or the lower one that `MLSTM_CPU_LEVEL` names. A name that is
    /// unknown or not available here changes nothing: the variable can lower, never raise.
    pub(crate) fn current() -> Self {
        static CURRENT: OnceLock<Level> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let levels = Self::available();
            let wanted = std::env::var("MLSTM_CPU_LEVEL").unwrap_or_default();
            let named = levels.iter().find(|level| level.name().eq_ignore_ascii_case(&wanted));
            named.or(levels.last()).copied().unwrap_or(Self::Scalar)
        })
    }
}
