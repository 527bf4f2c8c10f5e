//! Compiles `kernels/*.cu` to fatbins and writes `kernels.rs`, which embeds them.
//!
//! Files are compiled to machine code for sm_80 and sm_90, and to PTX of compute_80 for everything
//! newer; files named `*_sm90.cu` use instructions of the H100 and H200 and hold code for these
//! only. `MLSTM_CUDA_ARCHS` (e.g. "90") limits the machine code, for quick builds;
//! `MLSTM_CUDA_SLOW=1` lets slow code pass with a warning, for compilers that need it.

use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const ARCHS: &str = "80 90";

/// Compiles all kernels.
///
/// # Errors
/// What went wrong and what to do, for the user who builds.
pub fn compile() -> Result<(), String> {
    for name in ["NVCC", "CUDA_HOME", "MLSTM_CUDA_ARCHS", "MLSTM_CUDA_SLOW"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let nvcc = find_nvcc(&root)?;
    let archs = std::env::var("MLSTM_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let sources = sources(&root.join("kernels"))?;
    // OUT_DIR is <target>/<profile>/build/<package>/out; profiles share the compiled kernels.
    let cache = out.ancestors().nth(4).unwrap_or(&out).join("kernels");
    fs::create_dir_all(&cache).map_err(|error| format!("error: {}: {error}", cache.display()))?;

    let queue = Mutex::new(sources.iter());
    let errors = Mutex::new(String::new());
    let jobs = variable("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, sources.len().max(1)) {
            scope.spawn(|| {
                while let Some(source) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    let job = Job { nvcc: &nvcc, archs: &archs, source };
                    if let (Err(error), Ok(mut errors)) = (job.run(&cache, &out), errors.lock()) {
                        let _ = writeln!(errors, "{error}");
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().map_err(|_| "a compile job panicked".to_string())?;
    if errors.is_empty() { embed(&sources, &out) } else { Err(errors) }
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; run this through cargo"))
}

/// $NVCC, then $CUDA_HOME, PATH, and NVIDIA's wheels in ./.venv.
fn find_nvcc(root: &Path) -> Result<PathBuf, String> {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return Ok(nvcc.into());
    }
    let mut places: Vec<PathBuf> = Vec::new();
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        places.push(Path::new(&home).join("bin"));
    }
    places.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    for python in fs::read_dir(root.join(".venv/lib")).into_iter().flatten().flatten() {
        places.push(python.path().join("site-packages/nvidia/cu13/bin"));
    }
    places.into_iter().map(|place| place.join("nvcc")).find(|path| path.is_file()).ok_or_else(|| {
        "error: the CUDA compiler nvcc was not found (looked at $NVCC, $CUDA_HOME/bin, $PATH and \
         the wheels in ./.venv).\n\
         Either install it into ./.venv (no root needed):\n  \
         python3 -m venv .venv\n  \
         .venv/bin/pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* \
         nvidia-nvvm==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*\n\
         or build for the CPU only: cargo build --release --no-default-features"
            .into()
    })
}

/// The .cu files.
fn sources(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error| format!("cannot read {}: {error}", folder.display());
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

/// A file and all of ours that it includes, in order, each once.
fn with_includes(path: &Path, texts: &mut Vec<(PathBuf, String)>) -> Result<(), String> {
    if texts.iter().any(|(known, _)| known == path) {
        return Ok(());
    }
    let text = fs::read_to_string(path)
        .map_err(|error| format!("error: cannot read {}: {error}", path.display()))?;
    let names: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("#include \"")?.split('"').next().map(Into::into))
        .collect();
    texts.push((path.into(), text));
    names.iter().try_for_each(|name| with_includes(&path.with_file_name(name), texts))
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

struct Job<'a> {
    nvcc: &'a Path,
    archs: &'a str,
    source: &'a Path,
}

impl Job<'_> {
    fn run(&self, cache: &Path, out: &Path) -> Result<(), String> {
        let name = stem(self.source);
        let failed = |error| format!("error: {}: {error}", self.source.display());
        let mut command = Command::new(self.nvcc);
        command
            .args(["-fatbin", "-std=c++17", "-O3", "-Xptxas=-v", "-Xfatbin=-compress-all"])
            .args(self.code(&name));
        // Kernels take minutes to compile; what has been compiled before is kept.
        let mut hasher = DefaultHasher::new();
        format!("{command:?}").hash(&mut hasher);
        let mut texts = Vec::new();
        with_includes(self.source, &mut texts)?;
        texts.iter().for_each(|(_, text)| text.hash(&mut hasher));
        let done = cache.join(format!("{name}-{:016x}.fatbin", hasher.finish()));
        if !done.is_file() {
            // Under a name of its own first: another build may be at it too.
            let fresh = cache.join(format!("{name}-{}.tmp", std::process::id()));
            let compiled = self.compile(command.arg("-o").arg(&fresh).arg(self.source));
            if compiled.is_err() {
                let _ = fs::remove_file(&fresh);
            }
            compiled?;
            fs::rename(&fresh, &done).map_err(failed)?;
        }
        fs::copy(&done, out.join(format!("{name}.fatbin"))).map(|_| ()).map_err(failed)
    }

    fn compile(&self, command: &mut Command) -> Result<(), String> {
        let output = command
            .output()
            .map_err(|error| format!("error: cannot run {}: {error}", self.nvcc.display()))?;
        let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(format!("error: nvcc failed on {}:\n{log}", self.source.display()));
        }
        let Err(what) = check(&log) else { return Ok(()) };
        let what = format!("{}: {what}", self.source.display());
        if std::env::var_os("MLSTM_CUDA_SLOW").is_none() {
            return Err(format!("error: {what}"));
        }
        println!("cargo:warning={what}");
        Ok(())
    }

    fn code(&self, name: &str) -> Vec<String> {
        if name.ends_with("_sm90") {
            return vec!["-gencode=arch=compute_90a,code=sm_90a".into()];
        }
        let mut flags: Vec<String> = self
            .archs
            .split_whitespace()
            .map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}"))
            .collect();
        flags.push("-gencode=arch=compute_80,code=compute_80".into());
        flags
    }
}

/// Refuses what ptxas only mentions but what makes a kernel slow: registers spilled to memory (but
/// in float64 kernels, which nobody runs for speed) and serialised tensor-core instructions.
fn check(log: &str) -> Result<(), String> {
    let mut kernel = "";
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest;
        }
        let spills = line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
        if spills && !kernel.split('\'').next().is_some_and(|name| name.ends_with("_f64")) {
            return Err(format!("registers spill in '{kernel}: {}", line.trim()));
        }
        if line.contains("C75") && !line.contains("C7519") {
            return Err(format!("wgmma is serialised: {line}"));
        }
    }
    Ok(())
}

fn embed(sources: &[PathBuf], out: &Path) -> Result<(), String> {
    let mut code = String::from("pub(super) static IMAGES: &[Image] = &[\n");
    for source in sources {
        let name = stem(source);
        let _ = writeln!(
            code,
            "    Image {{ name: \"{name}\", backward: {}, hopper_only: {}, code: &Aligned(*include_bytes!(\
             concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))) }},",
            name.starts_with("backward_") || name.starts_with("gategrad"),
            name.ends_with("_sm90")
        );
    }
    code.push_str("];\n");
    let path = out.join("kernels.rs");
    fs::write(&path, code).map_err(|error| format!("error: {}: {error}", path.display()))
}
