/**
 * The parts of the OCI runtime-spec (config.json, version 1.0 to 1.3) that Kiln looks at.
 *
 * Source: github.com/opencontainers/runtime-spec, specs-go/config.go. A spec may hold more than these types say; what
 * is not here goes to the guest's crun as it came.
 */
import type { Integer } from './json.ts';

export interface Spec {
  readonly ociVersion: string;
  readonly process: Process;
  readonly root: Root;
  readonly hostname?: string | undefined;
  readonly domainname?: string | undefined;
  readonly mounts?: readonly Mount[] | undefined;
  /** Programs to run, in order, by the moment they run at. */
  readonly hooks?: Readonly<Partial<Record<HookMoment, readonly Hook[] | undefined>>> | undefined;
  readonly annotations?: Readonly<Record<string, string>> | undefined;
  readonly linux?: Linux | undefined;
}

export interface Process {
  readonly terminal?: boolean | undefined;
  /** The terminal's, in characters. */
  readonly consoleSize?: { readonly width: Integer; readonly height: Integer } | undefined;
  readonly args: readonly string[];
  readonly env?: readonly string[] | undefined;
  /** Absolute path in the container. */
  readonly cwd: string;
  readonly user?:
    | {
        readonly uid?: Integer | undefined;
        readonly gid?: Integer | undefined;
        readonly additionalGids?: readonly Integer[] | undefined;
      }
    | undefined;
  /** By their set: bounding, effective, inheritable, permitted, ambient. */
  readonly capabilities?: Readonly<Record<string, readonly string[] | undefined>> | undefined;
  readonly apparmorProfile?: string | undefined;
  readonly selinuxLabel?: string | undefined;
}

export interface Root {
  /** Absolute, or relative to the bundle. */
  readonly path: string;
  readonly readonly?: boolean | undefined;
}

export interface Mount {
  readonly destination: string;
  readonly type?: string | undefined;
  readonly source?: string | undefined;
  readonly options?: readonly string[] | undefined;
}

/** config.md "POSIX-platform Hooks". */
export const hookMoments = [
  'prestart',
  'createRuntime',
  'createContainer',
  'startContainer',
  'poststart',
  'poststop',
] as const;

export type HookMoment = (typeof hookMoments)[number];

export interface Hook {
  /** Absolute. */
  readonly path: string;
  /** The whole argv. */
  readonly args?: readonly string[] | undefined;
  /** The whole environment, as NAME=VALUE. */
  readonly env?: readonly string[] | undefined;
  /** Seconds, more than 0. */
  readonly timeout?: Integer | undefined;
}

export interface Linux {
  readonly namespaces?: readonly Namespace[] | undefined;
  readonly devices?: readonly Device[] | undefined;
  readonly cgroupsPath?: string | undefined;
  readonly resources?: Resources | undefined;
  readonly sysctl?: Readonly<Record<string, string>> | undefined;
}

export interface Namespace {
  readonly type: string;
  /** An existing namespace to join, in place of a new one. */
  readonly path?: string | undefined;
}

export interface Device {
  readonly path: string;
  /** c and u: character device, b: block device, p: FIFO. */
  readonly type: string;
  readonly major?: Integer | undefined;
  readonly minor?: Integer | undefined;
  /** Permissions of the node. */
  readonly fileMode?: Integer | undefined;
  readonly uid?: Integer | undefined;
  readonly gid?: Integer | undefined;
}

/** A rule of the device cgroup. */
export interface DeviceRule {
  readonly allow?: boolean | undefined;
  /** a: all, c: character devices, b: block devices. */
  readonly type?: string | undefined;
  /** Absent or -1: any. */
  readonly major?: Integer | undefined;
  readonly minor?: Integer | undefined;
  /** Of r, w and m (mknod). */
  readonly access?: string | undefined;
}

export interface Resources {
  /** Rules of the device cgroup; the last one that concerns a device counts. */
  readonly devices?: readonly DeviceRule[] | undefined;
  readonly memory?: { readonly limit?: Integer | undefined } | undefined;
  readonly cpu?:
    | {
        /** Microseconds of CPU time in each period; not positive for no limit. */
        readonly quota?: Integer | undefined;
        /** Microseconds. */
        readonly period?: Integer | undefined;
      }
    | undefined;
  /** cgroup v2 files and what to write into them. */
  readonly unified?: Readonly<Record<string, string>> | undefined;
}
