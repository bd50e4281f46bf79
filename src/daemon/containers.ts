import path from 'node:path';
import { applyAnnotations } from '../config/annotations.ts';
import type { LoadedConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import { findNodes, lookAtDevice } from '../host/block-devices.ts';
import { planControlGroup } from '../host/control-group.ts';
import type { Logger } from '../observe/logger.ts';
import { possibleNodes } from '../oci/block-devices.ts';
import { parseProcess, readBundle } from '../oci/bundle.ts';
import { withPodFiles } from '../oci/cri-pod.ts';
import { terminalSize, toGuestProcess, toGuestSpec } from '../oci/guest-spec.ts';
import { hostHooks } from '../oci/hooks.ts';
import { stringifyJson } from '../oci/json.ts';
import { podPlace } from '../oci/pod.ts';
import { networkNamespaceOf } from '../oci/pod-spec.ts';
import { withoutDevicesOfPrivileged } from '../oci/privileged.ts';
import { memoryLimitOf, vmSize } from '../oci/vm-size.ts';
import { guestRootDirectory, planRootfs } from '../rootfs/index.ts';
import { mountsNow } from '../rootfs/mountinfo.ts';
import { planChanges } from '../sandbox/changes.ts';
import { bootContainer } from '../sandbox/create.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import type { Pods } from '../sandbox/pod.ts';
import type { SandboxPool } from '../sandbox/pool.ts';
import type { HostServices } from '../sandbox/resources.ts';
import { isIdentifier } from '../shim/control/request.ts';
import { createOptionsOf, standInOfExec } from '../shim/create-options.ts';
import { unheededOptions } from '../shim/runtime-options.ts';
import { openStdio, type StdioPaths } from '../shim/stdio.ts';
import type { ExecTaskRequest, TaskContainer, TaskRequest } from '../shim/task.ts';
import { ProcessHandle } from '../sys/pidfd.ts';
import type { ContainerContext } from './endpoints.ts';
import { guestFiles } from './installation.ts';
import { makePod, requireNetworkOf } from './pods.ts';
import { selectVmm } from './vmm.ts';

/** What belongs to kilnd, not to one container. */
export interface Installation {
  readonly host: HostServices & { readonly pool: SandboxPool };
  readonly pods: Pods;
  /** Called for each container, so that a change of the configuration needs no restart. */
  readonly load: () => LoadedConfig;
}

/**
 * containerd's request as a container. Everything that can be refused by reading alone is refused here, before
 * anything is acquired.
 */
export async function createContainer(
  installation: Installation,
  request: TaskRequest,
  context: ContainerContext,
  signal: AbortSignal,
): Promise<TaskContainer> {
  const { host, pods, load } = installation;
  const { timeline, logger } = context;
  const { id, stdin, stdout, stderr, terminal } = request;
  timeline.mark('request');
  const loaded = load();
  const given = await readBundle(request.bundle);
  const privileged = withoutDevicesOfPrivileged(given.spec);
  for (const warning of privileged.warnings) logger.warn(warning);
  const bundle = { ...given, spec: privileged.spec };
  const config = applyAnnotations(loaded.config, bundle.spec.annotations);
  const hooks = {
    ...hostHooks(bundle.spec),
    bundle: bundle.dir,
    ociVersion: bundle.spec.ociVersion,
    annotations: bundle.spec.annotations ?? {},
  };
  const common = {
    ...{
      id,
      directory: context.directory,
      config,
      vmm: await selectVmm(config, { logger, parking: host.parking }),
      hooks,
    },
    ...{ files: guestFiles(config, loaded.paths), terminal, timeline, logger },
    openStdio: () => openStdioOf({ stdin, stdout, stderr, terminal }, context),
  };
  const place = podPlace(bundle.spec);
  const ours = createOptionsOf(request);
  if (place.kind === 'sandbox') {
    return makePod(installation, bundle.spec, { ...common, standInPid: ours?.processPid }, signal);
  }
  const pod =
    place.kind === 'member'
      ? await pods.findForNew(context.directoryOf(place.sandboxId), place.sandboxId, signal)
      : undefined;
  if (pod !== undefined) await requireNetworkOf(pod, bundle.spec, ours?.processPid);
  // Without mounts of a snapshotter (a bundle of ours or Docker's, `ctr run --rootfs`), what it writes is in the directory.
  const liveRoot = request.rootfs.length === 0 ? bundle.rootPath : undefined;
  const nodeAt = await findNodes(possibleNodes(bundle.spec));
  const guestOptions = {
    id,
    liveRoot,
    rootfsPath: guestRootDirectory(id),
    bundle: bundle.dir,
    nodeAt,
    hasMountsBelow: mountsNow(),
    ...(pod && { pod: { pid: pod.pid, containerAt: (at: number) => pod.containerAt(at) } }),
  };
  const spec = pod?.filesDirectory === undefined ? bundle.spec : withPodFiles(bundle.spec, pod.filesDirectory);
  const guest = toGuestSpec(spec, guestOptions);
  for (const warning of guest.warnings) logger.warn(warning);
  const devices = await Promise.all(guest.blockDevices.map(lookAtDevice));
  const unheeded = ours === undefined ? unheededOptions(request) : undefined;
  if (unheeded !== undefined) {
    logger.warn(`runtime options (${unheeded}) are not looked at: Kiln is configured by config.toml`);
  }
  requireSameTerminal(`container ${id}`, terminal, bundle.spec.process.terminal);
  const rootfs = liveRoot === undefined ? planRootfs(request.rootfs) : undefined;
  const changes = rootfs && planChanges(config.storage.changes, rootfs, bundle.spec.annotations);
  return bootContainer(
    host,
    {
      ...common,
      ...(pod === undefined ? vmSize(config, bundle.spec) : { memoryMib: 0, vcpus: 0 }),
      groupPlan: pod === undefined ? planControlGroup(bundle.spec.linux?.cgroupsPath) : undefined,
      memoryBytes: memoryLimitOf(bundle.spec),
      networkNamespace: pod === undefined ? networkNamespaceOf(bundle.spec) : `/proc/${pod.pid}/ns/net`,
      standInPid: ours?.processPid,
      pod,
      spec: (volumeNumbers, deviceNumbers) => {
        // Only volumes and block devices have numbers in it.
        const none = volumeNumbers.length + deviceNumbers.length === 0;
        const numbered = none ? guest : toGuestSpec(spec, { ...guestOptions, volumeNumbers, deviceNumbers });
        return stringifyJson(numbered.spec);
      },
      volumes: guest.volumes,
      blockDevices: { devices, filesystems: guest.filesystems },
      resolvConf: guest.volumes.findLast(({ destination }) => path.normalize(destination) === '/etc/resolv.conf')
        ?.source,
      rootfs,
      changes,
      terminalSize: terminalSize(bundle.spec.process),
    },
    signal,
  );
}

/** Has virtual machines of the configuration's size wait for containers. Never rejects. */
export async function keepPool({ host, load }: Installation, logger: Logger): Promise<void> {
  try {
    const { config, paths } = load();
    const { memoryMib, vcpus, networkCards, bootTimeoutS } = config.vm;
    const shape = { memoryMib, vcpus, networkCards, ...guestFiles(config, paths) };
    const vmm = await selectVmm(config, { logger, parking: host.parking });
    const request = { vmm, shape, bootTimeoutMs: bootTimeoutS * 1000 };
    const template = await host.templates.provide(request, new AbortController().signal);
    if (template === undefined) logger.warn('there is no pool: virtual machines cannot be restored from a template');
    else host.pool.keep(template, request, config.pool);
  } catch (error) {
    logger.warn({ err: error }, 'there is no pool');
  }
}

/** The type of what an Exec request's spec holds, whatever stands before it. containerd typeurl, runtime-spec. */
const processType = /(^|\/)opencontainers\/runtime-spec\/1\/Process$/;

/** containerd's request as a process to start; everything that can be refused by reading alone is refused here. */
export function prepareExec(request: ExecTaskRequest, context: ExecContext): ExecRequest {
  const { id, execId, stdin, stdout, stderr, terminal, spec } = request;
  const { logger } = context;
  const name = `exec ${execId} of container ${id}`;
  // It becomes a part of a path.
  if (!isIdentifier(execId))
    throw new KilnError('invalid-argument', `${JSON.stringify(execId)} is no exec id`, {
      hint: 'it has 1 to 76 letters, digits, ".", "_" or "-"',
    });
  if (spec === undefined || !processType.test(spec.typeUrl)) {
    throw new KilnError('invalid-argument', `${name}: its spec is ${spec?.typeUrl || 'missing'}, not an OCI process`);
  }
  const given = parseProcess(spec.value.toString(), name);
  requireSameTerminal(name, terminal, given.terminal);
  const { process, warnings } = toGuestProcess(given, { id, rootfsPath: guestRootDirectory(id) });
  for (const warning of warnings) logger.warn({ execId }, warning);
  const directory = path.join(context.directory, `exec-${execId}`);
  const standInPid = standInOfExec(spec.typeUrl);
  return {
    execId,
    directory,
    process: stringifyJson(process),
    ...(standInPid !== undefined && { openStandIn: () => ProcessHandle.open(standInPid) }),
    terminal,
    terminalSize: terminalSize(given),
    openStdio: () => openStdioOf({ stdin, stdout, stderr, terminal }, { ...context, directory }),
  };
}

/** What an exec gets from kilnd. */
interface ExecContext extends Omit<ContainerContext, 'timeline'> {
  /** It runs already, since an earlier kilnd. */
  readonly adopt?: boolean;
}

export function openStdioOf(
  paths: StdioPaths,
  { id, namespace, directory, logger, holds, adopt = false }: ExecContext,
) {
  const onError = (name: string, error: Error) => logger.error({ err: error }, `output to ${name} is being lost`);
  return openStdio(paths, { id, namespace, directory, holds, adopt, onError });
}

/** The request says how the client talks to the process, the spec what the process gets: they must be the same. */
function requireSameTerminal(name: string, wanted: boolean, inSpec: boolean | undefined): void {
  if (wanted === (inSpec ?? false)) return;
  const asked = wanted ? 'a terminal is asked for' : 'no terminal is asked for';
  throw new KilnError('invalid-argument', `${name}: ${asked}, but process.terminal in its spec is ${inSpec ?? false}`);
}
