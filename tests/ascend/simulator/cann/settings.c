// Settings that the simulator accepts and that change nothing in it. What stands neither here nor in the other files is
// reported by torch_npu as a function it did not find, when it is first needed.
#include "simulator.h"

#define ACCEPTED(name) int name(void) { return OK; }
ACCEPTED(aclrtCtxSetSysParamOpt)
ACCEPTED(aclrtSetSysParamOpt)
ACCEPTED(aclrtSetOpExecuteTimeOut)
ACCEPTED(aclrtSetOpExecuteTimeOutV2)
ACCEPTED(aclrtSetOpWaitTimeout)
ACCEPTED(aclrtSetStreamFailureMode)
ACCEPTED(aclrtSetStreamOverflowSwitch)
ACCEPTED(aclrtSetStreamAttribute)
ACCEPTED(aclrtDeviceEnablePeerAccess)
