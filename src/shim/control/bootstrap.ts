/**
 * The talk of `start`: what containerd writes to the shim's stdin, and what it takes for an answer on stdout.
 *
 *   containerd       stdin                                   stdout
 *   1.6              google.protobuf.Any of runtime options, the address: `unix:///run/kiln/s/…`
 *                    or nothing
 *   1.7 to 2.2       the same                                the address, or JSON: {"version":2,"address":"unix:///…",
 *                                                            "protocol":"ttrpc"}
 *   2.3 and newer    BootstrapParams                         BootstrapResult, or one of the two above
 *
 * (containerd core/runtime/v2/binary.go and shim.go, pkg/shim/util.go.) An Any reads as BootstrapParams, too, its type
 * and value as id and namespace; so these must be those of the command line, which is how containerd's own library tells
 * them apart (pkg/shim/compat.go).
 *
 * The version is that of the task service: 2 or 3, the same methods under two names. containerd says in MAX_SHIM_VERSION
 * the highest that it wants; 1.6 does not set it, and knows no JSON. All that set it so far say 2 (1.7 refuses 3), but
 * from 2.0 on the `env` of its plugin io.containerd.shim.v1.manager can say 3. What stands for a pod is answered with 2 then, too
 * (daemon/endpoints.ts).
 */
import { BootstrapParams, BootstrapResult, LogLevel } from '../../../gen/containerd/bootstrap.ts';
import type { TaskLogLevel } from '../../observe/task-log.ts';
import type { LauncherContext } from './request.ts';

const newestTaskVersion = 3;

/** What is to be heeded of containerd's side of a `start`. */
export interface Bootstrap {
  /** The form of the answer that this containerd takes. */
  readonly answer: 'text' | 'json' | 'protobuf';
  /** Version of the task service that containerd shall call. */
  readonly taskVersion: 2 | 3;
  /** containerd's own log takes this and what is more severe. */
  readonly logLevel: TaskLogLevel;
  /** Empty before containerd 2.3, which does not tell it. */
  readonly containerdVersion: string;
}

/**
 * @param payload what containerd wrote to stdin. One that is no BootstrapParams of this very container is an older
 *   containerd's, and no error.
 */
export function readBootstrap(context: LauncherContext, payload: Uint8Array): Bootstrap {
  const { maxShimVersion, debug } = context;
  const taskVersion = maxShimVersion >= newestTaskVersion ? newestTaskVersion : 2;
  const params = paramsOf(context, payload);
  if (params === undefined) {
    return {
      answer: maxShimVersion >= 2 ? 'json' : 'text',
      taskVersion,
      logLevel: debug ? 'debug' : 'info',
      containerdVersion: '',
    };
  }
  return {
    answer: 'protobuf',
    taskVersion,
    logLevel: taskLogLevel(params.logLevel),
    containerdVersion: params.containerdVersion,
  };
}

/** What the launcher prints for a socket at `address`, a URL. */
export function encodeStartAnswer({ answer, taskVersion }: Bootstrap, address: string): Uint8Array {
  const result = { version: taskVersion, address, protocol: 'ttrpc' };
  switch (answer) {
    case 'text':
      return Buffer.from(address);
    case 'json':
      return Buffer.from(JSON.stringify(result));
    case 'protobuf':
      return BootstrapResult.encode({ ...result, capabilities: [], metadata: {} }).finish();
  }
}

function paramsOf({ id, namespace }: LauncherContext, payload: Uint8Array): BootstrapParams | undefined {
  let params: BootstrapParams;
  try {
    params = BootstrapParams.decode(payload);
  } catch {
    return undefined;
  }
  return params.instanceId === id && params.namespace === namespace ? params : undefined;
}

/** The nearest of ours; the numbers grow with severity. Finer than debug, or worse than an error, we have nothing. */
function taskLogLevel(level: number): TaskLogLevel {
  const between = (finer: number, coarser: number): number => (finer + coarser) / 2;
  if (level < between(LogLevel.LOG_LEVEL_DEBUG, LogLevel.LOG_LEVEL_INFO)) return 'debug';
  if (level < between(LogLevel.LOG_LEVEL_INFO, LogLevel.LOG_LEVEL_WARN)) return 'info';
  if (level < between(LogLevel.LOG_LEVEL_WARN, LogLevel.LOG_LEVEL_ERROR)) return 'warning';
  return 'error';
}
