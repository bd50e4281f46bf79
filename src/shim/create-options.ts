/** The options with which Kiln's own command line creates a container: proto/kiln/oci/v1/create.proto. */
import type { Any } from '../../gen/google/protobuf/any.ts';
import { CreateOptions } from '../../gen/kiln/oci/v1/create.ts';
import type { TaskRequest } from './task.ts';

const typeUrl = 'kiln.oci.v1.CreateOptions';

export function encodeCreateOptions(options: CreateOptions): Any {
  return { typeUrl, value: Buffer.from(CreateOptions.encode(options).finish()) };
}

/** Undefined for a Create of containerd's. */
export function createOptionsOf({ options }: TaskRequest): CreateOptions | undefined {
  return options?.typeUrl === typeUrl ? CreateOptions.decode(options.value) : undefined;
}
