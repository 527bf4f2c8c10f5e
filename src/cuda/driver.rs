//! Everything that talks to the CUDA driver. The driver is loaded at run time, so that the library
//! works on machines without one; devices are opened once and kept.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::modules::IMAGES;
use crate::error::{Error, Result};
use crate::workspace::Stream;

/// A device with its kernels loaded.
pub(super) struct Device {
    context: sys::CUcontext,
    kernels: Kernels,
    /// Those that only backwards need, loaded by the first one.
    backward: OnceLock<Result<Kernels>>,
    /// Most shared memory a block can have, bytes.
    shared_limit: c_int,
    capability: (c_int, c_int),
}

/// Whether a device is an H100 or H200, or for -1 all of them are; `None` if it cannot be told, or if
/// some are and some are not.
pub(crate) fn is_hopper(index: i32) -> Option<bool> {
    let count = i32::try_from(slots().ok()?.len()).ok()?;
    if index >= 0 {
        return compute_capability(index).map(|it| it == HOPPER);
    }
    let first = is_hopper(0)?;
    (1..count).all(|other| is_hopper(other) == Some(first)).then_some(first)
}

/// Of an open device as it was read then; calls ask every time.
fn compute_capability(index: i32) -> Option<(c_int, c_int)> {
    use sys::CUdevice_attribute as Attribute;
    let slot = slots().ok()?.get(usize::try_from(index).ok()?)?;
    if let Some(Ok(open)) = slot.get() {
        return Some(open.capability);
    }
    let mut device = 0;
    // SAFETY: a device that there is, and a valid out pointer.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index) }).ok()?;
    let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let minor = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
    Some((attribute(device, major).ok()?, attribute(device, minor).ok()?))
}

/// Compute capability of the H100 and H200.
const HOPPER: (c_int, c_int) = (9, 0);

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Device {}
// SAFETY: as above; nothing changes after `open`.
unsafe impl Sync for Device {}

type Kernels = HashMap<String, Kernel>;

struct Kernel {
    function: sys::CUfunction,
    geometry: Geometry,
}

/// How a kernel wants to be launched: `MLSTM_GEOMETRY` in `kernels/params.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Geometry {
    /// Rows and columns of a block's tile.
    pub(super) rows: i32,
    pub(super) cols: i32,
    pub(super) threads: i32,
    /// Dynamic shared memory, bytes.
    pub(super) shared: i32,
}

pub(super) fn check(what: &str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: fills in a pointer to a static string, or null.
    unsafe { sys::cuGetErrorName(result, &raw mut name) };
    let name = if name.is_null() {
        "an unknown error".into()
    } else {
        // SAFETY: a static C string of the driver.
        unsafe { CStr::from_ptr(name) }.to_string_lossy()
    };
    Err(Error::Device(format!("{what} failed with {name} ({})", result as u32)))
}

/// The driver's devices, one slot each; the outer error says why there are none.
fn slots() -> Result<&'static [OnceLock<Result<Device>>]> {
    static SLOTS: OnceLock<Result<Vec<OnceLock<Result<Device>>>>> = OnceLock::new();
    let slots = SLOTS.get_or_init(|| {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "no CUDA driver on this machine (libcuda.so.1 was not found); install NVIDIA's \
                 driver or use MLSTM_DEVICE_CPU"
                    .into(),
            ));
        }
        let mut count = 0;
        // SAFETY: plain calls of the driver with a valid out pointer.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut count))?;
        }
        Ok((0..count).map(|_| OnceLock::new()).collect())
    });
    slots.as_deref().map_err(Clone::clone)
}

/// The device, opened by the first call for it.
pub(super) fn device(index: i32) -> Result<&'static Device> {
    let slots = slots()?;
    let slot = usize::try_from(index).ok().and_then(|at| slots.get(at)).ok_or_else(|| {
        Error::invalid(
            "problem.device_index",
            format!("0 to {} (CUDA devices here: {})", slots.len().saturating_sub(1), slots.len()),
            index,
        )
    })?;
    slot.get_or_init(|| without_capture(|| Device::open(index))).as_ref().map_err(Clone::clone)
}

/// Runs what a stream capture in another thread would otherwise forbid, or be broken by.
fn without_capture<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    let mut swap = || {
        // SAFETY: swaps this thread's mode with the one in `mode`.
        let result = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        check("cuThreadExchangeStreamCaptureMode", result)
    };
    swap()?;
    let result = work();
    swap()?;
    result
}

/// Makes a context current and, when dropped, the caller's one again. Most callers have it current
/// already.
struct Current {
    pushed: bool,
}

impl Current {
    fn push(context: sys::CUcontext) -> Result<Self> {
        let mut current = std::ptr::null_mut();
        // SAFETY: a valid out pointer.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
        let pushed = current != context;
        if pushed {
            // SAFETY: a retained primary context.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context) })?;
        }
        Ok(Self { pushed })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: pops what `push` pushed; there is nothing to be done about an error.
            unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
        }
    }
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: a valid device and out pointer.
    check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, which, device)
    })?;
    Ok(value)
}

impl Device {
    fn open(index: i32) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: valid out pointers; the context is kept for ever, like the device's slot.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, index))?;
            check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&raw mut context, device),
            )?;
        }
        let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared =
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if major < 8 {
            return Err(Error::Device(format!(
                "CUDA device {index} has compute capability {major}.{minor}; mlstm needs 8.0 \
                 (Ampere) or newer"
            )));
        }
        let mut device = Self {
            context,
            kernels: Kernels::new(),
            backward: OnceLock::new(),
            shared_limit: shared,
            capability: (major, minor),
        };
        device.kernels = device.load(false)?;
        Ok(device)
    }

    /// Loads what backwards need, unless it is there.
    pub(super) fn load_backward(&self) -> Result<()> {
        let kernels = self.backward.get_or_init(|| without_capture(|| self.load(true)));
        kernels.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// The kernels that backwards alone need, or the others.
    fn load(&self, backward: bool) -> Result<Kernels> {
        let _current = Current::push(self.context)?;
        let mut kernels = Kernels::new();
        for image in IMAGES.iter().filter(|image| image.backward == backward) {
            if image.hopper_only && self.capability != HOPPER {
                continue;
            }
            let mut module = std::ptr::null_mut();
            // SAFETY: a complete fatbin, aligned, in memory that is never freed.
            check(&format!("loading the kernels of {}.cu", image.name), unsafe {
                sys::cuModuleLoadData(&raw mut module, image.code.0.as_ptr().cast())
            })?;
            load_functions(module, self.shared_limit, &mut kernels)?;
        }
        Ok(kernels)
    }

    fn find(&self, name: &str) -> Option<&Kernel> {
        let backward = || self.backward.get()?.as_ref().ok()?.get(name);
        self.kernels.get(name).or_else(backward)
    }

    fn kernel(&self, name: &str) -> Result<&Kernel> {
        self.find(name).ok_or_else(|| Error::Internal(format!("there is no CUDA kernel {name}")))
    }

    /// The geometry of a kernel, `None` if there is no such kernel or it does not fit this device.
    pub(super) fn geometry(&self, name: &str) -> Option<Geometry> {
        let geometry = self.find(name)?.geometry;
        (geometry.shared <= self.shared_limit).then_some(geometry)
    }

    /// Work on this device: launches and tensor maps in `work` have its context, the caller's is left as
    /// it was.
    pub(super) fn enqueue(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _current = Current::push(self.context)?;
        work()
    }

    /// Enqueues `blocks` of one kernel (none at all for 0); call it inside [`Device::enqueue`].
    /// With `overlap` it may start while the kernel before it still runs, and waits itself where it
    /// must.
    pub(super) fn launch<T>(
        &self,
        stream: Stream,
        name: &str,
        blocks: i64,
        overlap: bool,
        args: &T,
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let kernel = self.kernel(name)?;
        let grid = i32::try_from(blocks).map_err(|_| {
            Error::unsupported(
                "problem",
                format!("{blocks} blocks of {name} exceed CUDA's 2^31 - 1; split the batch"),
            )
        })?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.cast_unsigned(),
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: kernel.geometry.threads.cast_unsigned(),
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.geometry.shared.cast_unsigned(),
            hStream: stream.0.cast(),
            attrs: &raw mut attribute,
            // Programmatic launches exist from compute capability 9.0 on.
            numAttrs: c_uint::from(overlap && self.capability.0 >= 9),
        };
        let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one T by value, which the driver copies before it returns.
        check(name, unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

/// Loads all kernels of a module now, since loading inside a stream capture is not allowed.
fn load_functions(
    module: sys::CUmodule,
    shared_limit: c_int,
    kernels: &mut HashMap<String, Kernel>,
) -> Result<()> {
    use sys::CUfunction_attribute as Attribute;
    let mut count = 0;
    // SAFETY: a module just loaded; out pointers of the sizes the driver is told.
    let functions = unsafe {
        check("cuModuleGetFunctionCount", sys::cuModuleGetFunctionCount(&raw mut count, module))?;
        let mut functions = vec![std::ptr::null_mut(); count as usize];
        check(
            "cuModuleEnumerateFunctions",
            sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module),
        )?;
        functions
    };
    for function in functions {
        let (mut name, mut fixed) = (std::ptr::null(), 0);
        // SAFETY: a function of the module; the name lives as long as the module.
        let name = unsafe {
            check("cuFuncLoad", sys::cuFuncLoad(function))?;
            check("cuFuncGetName", sys::cuFuncGetName(&raw mut name, function))?;
            let fixed_shared = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            check(
                "cuFuncGetAttribute",
                sys::cuFuncGetAttribute(&raw mut fixed, fixed_shared, function),
            )?;
            let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(
                "cuFuncSetAttribute",
                sys::cuFuncSetAttribute(function, dynamic, shared_limit - fixed),
            )?;
            CStr::from_ptr(name)
        };
        let geometry = read_geometry(module, name)?;
        kernels.insert(name.to_string_lossy().into_owned(), Kernel { function, geometry });
    }
    Ok(())
}

/// The variable of a kernel's geometry.
fn read_geometry(module: sys::CUmodule, kernel: &CStr) -> Result<Geometry> {
    let mut name = kernel.to_bytes().to_vec();
    name.extend_from_slice(b"_geometry\0");
    let (mut pointer, mut size) = (0, 0);
    let mut geometry = Geometry::default();
    // SAFETY: a terminated name; what is copied has the size that was asked for.
    unsafe {
        check(
            &format!("looking for the geometry of {kernel:?}"),
            sys::cuModuleGetGlobal_v2(
                &raw mut pointer,
                &raw mut size,
                module,
                name.as_ptr().cast(),
            ),
        )?;
        if size != size_of::<Geometry>() {
            return Err(Error::Internal(format!("{kernel:?} has a geometry of {size} bytes")));
        }
        let target = (&raw mut geometry).cast();
        check("cuMemcpyDtoH", sys::cuMemcpyDtoH_v2(target, pointer, size))?;
    }
    Ok(geometry)
}
