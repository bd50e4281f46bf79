import { SysError } from '../../../src/sys/error.ts';
import { listenVsock, VMADDR_CID_ANY, VMADDR_PORT_ANY } from '../../../src/sys/vsock.ts';

/** Whether this kernel has AF_VSOCK sockets at all; that they reach anybody is another matter. */
export const hasVsock = (() => {
  try {
    listenVsock(VMADDR_CID_ANY, VMADDR_PORT_ANY).server.close();
    return true;
  } catch (error) {
    if (error instanceof SysError) return false;
    throw error;
  }
})();
